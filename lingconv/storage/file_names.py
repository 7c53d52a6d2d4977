"""Names and marks of files that lingconv writes, or looks for, in any format."""

CONFIG_NAME = "config.json"
RECORD_NAME = "lingconv.json"
CARD_NAME = "README.md"
PARTIAL_SUFFIX = ".partial"
SUFFIX = ".gguf"
# In cards that lingconv wrote, so that it replaces no other.
MARK = "<!-- made by lingconv -->"
