"""file_names."""

PARTIAL_SUFFIX = ".partial"


MARK = "<!-- made by lingconv -->"


SUFFIX = ".gguf"


CONFIG_NAME = "config.json"


RECORD_NAME = "lingconv.json"


CARD_NAME = "README.md"
