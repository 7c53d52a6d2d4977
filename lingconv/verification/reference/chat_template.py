"""Chat templates: programs that strangers wrote, run in a process of their own with limits.

jinja2's sandbox keeps a template from Python's insides, but not from `9 ** 9 ** 9` or 4 GB of
padding. So this file is also the program of a child process: it limits its own memory and CPU time,
and then renders. It imports nothing of lingconv, and reads and writes ASCII JSON.
"""

import json
import os
import resource
import subprocess
import sys
from typing import Any, Final, NoReturn

MAX_MEMORY: Final = 2**30  # bytes of address space
MAX_CPU_S: Final = 5
MAX_TEXT: Final = 1_000_000  # characters
_NO_MEMORY: Final = 12  # exit code of the child: ENOMEM
# All that the child gets of the environment: what Python needs to start, and no token.
_ENVIRONMENT: Final = ("PATH", "HOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


def render(template: str, variables: dict[str, Any]) -> str:
    """Return the text that a template makes. Raises ValueError that says why there is none."""
    given = json.dumps({"template": template, "variables": variables}).encode("ascii")
    child = subprocess.run(
        [sys.executable, "-P", __file__],
        input=given,
        capture_output=True,
        env={k: v for k, v in os.environ.items() if k in _ENVIRONMENT or k[:6] == "PYTHON"},
        check=False,
    )
    if (
        child.returncode > 0
        and child.returncode != _NO_MEMORY
        and b"MemoryError" not in child.stderr
    ):
        raise RuntimeError(child.stderr.decode("utf-8", "replace"))
    if child.returncode:
        raise ValueError(
            f"it took more than {MAX_CPU_S} s, or more than {MAX_MEMORY >> 30} GiB of memory"
        )
    answer = json.loads(child.stdout)
    if "text" not in answer:
        raise ValueError(answer["error"])
    return str(answer["text"])


def _raise_exception(message: str) -> NoReturn:
    """Let a template refuse a conversation (templates call it by this name)."""
    raise ValueError(message)


def _limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    least = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (least, least))


def _rendered(template: str, variables: dict[str, Any]) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    _limit(resource.RLIMIT_AS, MAX_MEMORY)
    _limit(resource.RLIMIT_CPU, MAX_CPU_S)
    _limit(resource.RLIMIT_CORE, 0)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_exception
    parts: list[str] = []
    length = 0
    for part in environment.from_string(template).generate(**variables):
        parts.append(part)
        length += len(part)
        if length > MAX_TEXT:
            raise ValueError(f"it makes more than {MAX_TEXT:,} characters of text")
    return "".join(parts)


def main() -> None:
    """Answer one request: `template` and `variables` on stdin, `text` or `error` on stdout."""
    given = json.loads(sys.stdin.buffer.read())
    try:
        answer = {"text": _rendered(given["template"], given["variables"])}
    except MemoryError:
        sys.exit(_NO_MEMORY)
    except Exception as exc:  # a template may raise whatever Python can
        answer = {"error": str(exc)[:1000] or type(exc).__name__}
    sys.stdout.buffer.write(json.dumps(answer).encode("ascii"))


if __name__ == "__main__":
    main()
