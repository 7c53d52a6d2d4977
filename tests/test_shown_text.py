"""What strangers wrote is shown, never obeyed: names, words of servers; and streams that fail."""

import html
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from lingconv.cli import progress_display
from lingconv.cli.app import app
from lingconv.cli.output_streams import OutputStream, RawStream
from lingconv.cli.terminal import Terminal
from lingconv.cli.visible_text import MAX_LINE, filtered, visible
from lingconv.errors import CheckpointError, Fault, LingconvError, ResourceError
from lingconv.storage.hub import client
from lingconv.verification.reports import page
from tests.support import edit_json, read_header, write_raw

# Clear the screen, write the clipboard, forge a line, C1 controls, turn letters around, hide some,
# rich's markup, half a character, and a byte of a name that is not UTF-8.
HOSTILE = (
    "x\x1b[2J\x1b]52;c;ZWNobw==\x07\nerror: forged\r\x9b2J\x85\u2028\u202egnp\u2066\u200b\u115f"
    "[red][/b][link=http://a]\ud800 \udce9\x7f\t`|<b>&"
)
IN_A_PATH = HOSTILE.replace("\ud800", "").replace("/", "")


def unsafe(text):
    """Return the characters that a terminal may obey or hide, by Unicode's own categories."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")} - {
        "\n"
    }


def assert_safe(done, words):
    assert done.exit_code in (0, 1, 2, 3, 7), (words, done.output, done.exception)
    assert isinstance(done.exception, LingconvError | SystemExit | None), (words, done.exception)
    assert unsafe(done.output) == set(), (words, done.output)
    assert "\nerror: forged" not in done.output


@given(st.text())
def test_what_is_visible_is_safe_and_tells_texts_apart(text):
    shown = visible(text)
    assert unsafe(shown) == set()
    assert "\n" not in shown
    if "\\" not in text:
        assert shown.encode().decode().count("\\") >= len(unsafe(text))


def test_what_can_be_seen_stays():
    for text in ("model.layers.0", "süß 模型 ü", "█ 100 %", "a\\b"):
        assert visible(text) == text
    assert visible("a\x1b\n\u202e\udce9\ud800\U000e0001") == (
        "a\\x1b\\n\\u202e\\xe9\\ud800\\U000e0001"
    )


def test_long_texts_lose_their_middle():
    shown = visible("a" * 10**6 + "end")
    assert len(shown) < MAX_LINE + 100
    assert "996,003 characters left out" in shown
    assert shown.endswith("end")


def test_libraries_keep_lines_and_colours():
    assert filtered("a\x1b[1;31mred\x1b[0m\n\x1b[2Jb") == "a\x1b[1;31mred\x1b[0m\n\\x1b[2Jb"


@pytest.fixture
def hostile(golden, tmp_path):
    """Checkpoints with one hostile name or value each."""
    made = {}

    def copy(name):
        made[name] = tmp_path / name
        shutil.copytree(golden, made[name])
        return made[name]

    shard = "model-00001-of-00003.safetensors"
    folder = copy("tensor")
    header, data = read_header(folder / shard)
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    write_raw(folder / shard, {**header, HOSTILE: entry}, data)
    edit_json(
        copy("shard") / "model.safetensors.index.json",
        lambda v: v["weight_map"].update(x=HOSTILE.replace("/", "") + ".safetensors"),
    )
    for key in ("architectures", "hidden_act", "torch_dtype"):
        value = [HOSTILE] if key == "architectures" else HOSTILE
        edit_json(copy(key) / "config.json", lambda v, k=key, x=value: v.update({k: x}))
    (copy("file") / IN_A_PATH).touch()
    stated = {"quant_method": HOSTILE}
    edit_json(copy("method") / "config.json", lambda v: v.update(quantization_config=stated))
    ignore = {"quant_method": "fp8", "modules_to_not_convert": ["re:(" + HOSTILE]}
    edit_json(copy("pattern") / "config.json", lambda v: v.update(quantization_config=ignore))
    (copy("template") / "chat_template.jinja").write_text(
        "{{ raise_exception('" + IN_A_PATH.encode("utf-8", "replace").decode() + "') }}"
    )
    (copy("tokenizer") / "tokenizer_config.json").write_text('{"\x1b[2J')
    (made["tokenizer"] / "tokenizer.json").write_text('{"\x1b[2J')
    made["path"] = tmp_path / f"p{IN_A_PATH}"
    shutil.copytree(golden, made["path"])
    return made


def test_no_command_prints_a_hostile_name(hostile, golden, tmp_path):
    runner = CliRunner()
    for number, (kind, source) in enumerate(hostile.items()):
        target = str(tmp_path / f"out{number}")
        for words in (
            ["inspect", str(source), "-v"],
            ["inspect", str(source), "--json"],
            ["plan", str(source), target, "-v"],
            ["plan", str(source), target, "--drop", HOSTILE, "--json"],
            ["diff", str(golden), str(source)],
            ["diff", str(golden), str(source), "--json"],
            ["verify", str(golden), str(source), "--level", "bytes"],
            ["forward", str(source), "--prompt", "hi", "--chat"],
        ):
            done = runner.invoke(app, words)
            if done.exception and isinstance(done.exception, LingconvError):
                done = SimpleNamespace(
                    exit_code=done.exception.exit_code,
                    exception=done.exception,
                    output=done.output + told(done.exception),
                )
            assert_safe(done, [kind, *words])
            if "--json" in words and done.exit_code == 0:
                json.loads(done.stdout)
                assert done.stdout.isascii()


def told(error):
    """Return what the command line says of an error, in words and in JSON."""
    saved, sys.stderr = sys.stderr, io.StringIO()
    try:
        shown = Terminal()
        shown.verbose = shown.json = True
        shown.error(error)
        return sys.stderr.getvalue()
    finally:
        sys.stderr = saved


def test_every_part_of_an_error_is_made_visible():
    error = CheckpointError(HOSTILE, faults=[Fault("k", HOSTILE, HOSTILE, HOSTILE)], hint=HOSTILE)
    error.__cause__ = ValueError(HOSTILE)
    text = told(error)
    assert unsafe(text) == set()
    assert len(text.splitlines()) == 5
    assert json.loads(text.splitlines()[-1])["error"]["message"] == HOSTILE


def test_bars_show_names_as_they_are(monkeypatch):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(progress_display, "_live_console", lambda: console)
    plan = SimpleNamespace(
        source=HOSTILE, files=(SimpleNamespace(nbytes=10),), encodings=("bf16",),
        options=SimpleNamespace(layout="hf"), read_bytes=10, write_bytes=10,
    )  # fmt: skip
    with progress_display.Bars() as bars:
        bars.begin(plan, 1, 1)
        bars.file_begins(HOSTILE, 10, 0)
        bars.advance(HOSTILE, 10)
        bars.file_ends(HOSTILE, 10, 1.0)
        bars.advance(HOSTILE, 10)  # told by another thread, and late
        bars.sending(10)
        bars.file_sent(HOSTILE, 10, 1.0)
    text = written.getvalue()
    assert "[red][/b][link=http://a]" in text
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text
    assert unsafe(text) <= {"\x1b", "\r"}  # rich's own: it moves the cursor


class Failing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self._error = error

    def write(self, text):
        raise self._error

    def fileno(self):
        return os.dup(2)


@pytest.mark.parametrize("holds_results", [True, False])
def test_a_reader_that_goes_away_ends_nothing(holds_results):
    stream = OutputStream(Failing(BrokenPipeError(32, "gone")), holds_results=holds_results)
    stream._stream.fileno = lambda: os.open(os.devnull, os.O_WRONLY)
    assert stream.write("abc") == 3


def test_a_full_stdout_is_an_error_of_the_table_and_a_full_stderr_is_none():
    full = Failing(OSError(28, "No space left on device"))
    full.fileno = lambda: os.open(os.devnull, os.O_WRONLY)
    with pytest.raises(ResourceError, match="No space left"):
        OutputStream(full, holds_results=True).write("abc")
    assert OutputStream(full, holds_results=False).write("abc") == 3


def test_bars_write_their_own_control_sequences():
    inner = io.StringIO()
    RawStream(OutputStream(inner, holds_results=False)).write("\x1b[2K")
    assert inner.getvalue() == "\x1b[2K"


def shell(command, golden, **env):
    line = command.format(l=f"{sys.executable} -m lingconv", g=golden)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        capture_output=True, check=False, env={**os.environ, **env},
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("command", "code", "env"),
    [
        ("{l} inspect {g} >&-", 0, {}),
        ("{l} inspect {g} 2>&-", 0, {}),
        ("{l} inspect {g} >&- 2>&- <&-", 0, {}),
        ("{l} inspect {g} > /dev/full", 6, {}),
        ("{l} --help > /dev/full", 6, {}),
        ("{l} inspect {g}/none 2> /dev/full", 2, {}),
        ("{l} inspect -v {g} | true", 0, {}),
        ("{l} --help | true", 0, {}),
        ("{l} inspect {g} 2>&1 | true", 0, {}),
        ("{l} inspect {g}", 0, {"PYTHONIOENCODING": "ascii"}),
        ("{l} inspect {g}", 0, {"PYTHONIOENCODING": "utf-8:strict"}),
        ("{l} inspect {g}", 0, ASCII),
        ("{l} verify {g} {g} | true", 0, {}),
    ],
)
def test_streams_that_fail_have_codes_of_the_table(command, code, env, golden, tmp_path):
    folder = tmp_path / "süß"
    shutil.copytree(golden, folder)
    if "/none" in command:
        command, code = command.replace("inspect", "no-such-command"), 2
    assert shell(command, folder, **env).returncode == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_modules_are_loaded_is_answered(number, code, golden):
    program = (
        "import os, sys, builtins\nfrom lingconv.cli import main\nreal = builtins.__import__\n"
        "def load(name, *args, **options):\n"
        f"    if name == 'typer':\n        os.kill(os.getpid(), {int(number)})\n"
        "    return real(name, *args, **options)\n"
        f"builtins.__import__ = load\nsys.argv = ['lingconv', 'inspect', {str(golden)!r}]\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(b"error: interrupted")
    assert b"Traceback" not in done.stderr


def test_a_page_shows_codes_in_place_of_controls(tmp_path):
    page.write(f"<p>\n{html.escape(HOSTILE)}ü</p>", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert unsafe(text) <= {"\t"}
    assert text.startswith("<p>\n")
    assert text.endswith("ü</p>")
    assert "\\u001b[2J" in text


def test_tokens_are_struck_out(monkeypatch):
    token = "hf_aSecretThatNobodyMaySee"
    odd = "my+odd/token=="
    for secret in (token, odd):
        monkeypatch.setenv("HF_TOKEN", secret)
        escaped = "".join(f"%{ord(char):02x}" for char in secret)
        for said in (secret, f'{{"a": "{secret}"}}', escaped, client.quote(secret, safe="")):
            text = client.without_secrets(f"you said {said} to me")
            assert secret not in text
            assert said not in text
            assert "to me" in text
    assert "sig=" not in client.without_secrets("see https://x.y/z?sig=abc now")
    assert "abcdefgh" not in client.without_secrets("Authorization: Bearer abcdefghijk")
    assert len(client.without_secrets("x" * 10**6)) < 1000
    assert token not in str(client.Cause(ValueError(token)))
