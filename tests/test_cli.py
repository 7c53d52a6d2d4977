"""The command line, in a pipe and on a terminal."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from lingconv.cli.units import count, file_size, memory_size, parse_size
from lingconv.errors import UsageError
from tests.kit import Instant, command, send
from tests.support import copy_checkpoint

LINGCONV = [sys.executable, "-m", "lingconv"]
ANSI = re.compile(r"\x1b\[")


def run(*args, code=0):
    """Run the command where nobody sees it; return (stdout, stderr)."""
    done = command(*args)
    assert done.exit_code == code, (done.exit_code, done.out, done.err)
    assert not ANSI.search(done.out + done.err)
    return done.out, done.err


def run_on_terminal(*args):
    """Run the command on a pseudo-terminal; return (exit code, what a person would have seen)."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="100")
        os.execv(sys.executable, [*LINGCONV, *map(str, args)])
    seen = b""
    with suppress(OSError):  # what the other end's going away is, on Linux
        while data := os.read(terminal, 65536):
            seen += data
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), seen.decode()


def test_help_is_quick_to_load():
    heavy = ("torch", "numba", "numpy", "transformers", "huggingface_hub", "lingconv.plans.plan")
    code = (
        "import sys\nsys.argv = ['lingconv', '--help']\nfrom lingconv.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for each in ("inspect", "plan", "convert", "quantize", "synth", "formats", "env"):
        assert each in done.stdout


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_headers_need_no_numerics(command, golden, tmp_path):
    code = (
        "import sys\nfrom lingconv.cli import main\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "assert not {'torch', 'numba', 'numpy'} & set(sys.modules)"
    )
    words = [golden, tmp_path / "x"] if command == "plan" else [golden]
    subprocess.run([sys.executable, "-c", code, command, *words], capture_output=True, check=True)


def test_inspect(golden):
    out, err = run("inspect", golden)
    assert "Ling 2.0 (BailingMoeV2)" in out
    assert "1 dense + 1 MoE (8 experts) + 1 MTP" in out
    assert "nothing odd" in out
    assert err == ""
    value = json.loads(run("inspect", golden, "--json")[0])
    assert value["schema"] == "lingconv.inspect/1"
    assert (value["tensors"], value["tensor_bytes"], value["sound"]) == (86, 6_305_600, True)
    assert run("inspect", golden, "-q")[0] == "BailingMoeV2ForCausalLM\n"


def test_inspect_of_a_broken_checkpoint_reports_and_exits_3(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    (source / "model-00002-of-00003.safetensors").unlink()
    out, err = run("inspect", source, code=3)
    assert "FAULT  model-00002-of-00003.safetensors: the index names this shard" in out
    assert err == f"error: {source} has 1 fault\nhint: fetch the missing shards again\n"
    out, err = run("inspect", source, "--json", code=3)
    assert json.loads(out)["sound"] is False
    assert json.loads(err.splitlines()[-1])["error"]["exit_code"] == 3


def without_number_of_mtp_layers(golden, target):
    """Copy a checkpoint whose config leaves out the 39 tensors of the MTP layer."""
    source = copy_checkpoint(golden, target)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    return source


def test_inspect_caps_its_faults_and_hints_an_option_that_it_has(golden, tmp_path):
    source = without_number_of_mtp_layers(golden, tmp_path / "in")
    out, err = run("inspect", source, code=3)
    assert "more (-v or --json show all)" in out
    assert err.startswith(f"error: {source} has 39 faults\n")
    assert "hint: `--set num_nextn_predict_layers=1` takes it as a part of the model" in err
    assert "FAULT" not in run("inspect", source, "--set", "num_nextn_predict_layers=1")[0]


def test_plan_and_dry_run_say_the_same(golden, tmp_path):
    args = (golden, tmp_path / "out", "--dtype", "fp8", "--mtp", "drop")
    out, _ = run("plan", *args, "-o", tmp_path / "plan.json")
    dry = run("convert", *args, "--dry-run")[0]
    free = re.compile(r"\d+\.\d+ .B free")  # whoever else writes to this disk moves it
    assert free.sub("", out) == free.sub("", dry) != dry
    assert "left out: 39 with 2.43 MB (left out by `--mtp`)" in out
    assert "model.safetensors" in out
    assert not (tmp_path / "out").exists()
    saved = json.loads((tmp_path / "plan.json").read_text())
    value = json.loads(run("plan", *args, "--json")[0])
    assert value["schema"] == "lingconv.dry-run/1"
    assert value["files"][0]["bytes"] == saved["files"][0]["bytes"]
    assert value["read_bytes"] == 6_305_600 - 2_431_776
    assert {"free_bytes", "buffer_bytes", "jobs", "write_bytes", "digest"} <= value.keys()
    assert len(value["dropped"]) == 39


def test_quantize_convert_and_again(golden, tmp_path):
    out, err = run("quantize", golden, tmp_path / "fp8", "--fp8", "--max-shard-size", "1MB")
    assert "4 weight files" in out
    assert err.count("model-0000") == 4
    assert (
        "nothing to do" in run("quantize", golden, tmp_path / "fp8", "--max-shard-size", "1MB")[0]
    )
    value = json.loads(
        run("convert", tmp_path / "fp8", tmp_path / "b", "--dtype", "bf16", "--json")[0]
    )
    assert value["schema"] == "lingconv.convert/1"
    assert value["files_written"] == 1
    quiet = run("convert", tmp_path / "fp8", tmp_path / "c", "--dtype", "bf16", "-q")
    assert quiet == (f"{tmp_path / 'c'}\n", "")
    assert "Ling" in run("inspect", tmp_path / "c")[0]


def test_fp8_options_arrive(golden, tmp_path):
    run(
        "quantize", golden, tmp_path / "out", "--scale", "ue8m0", "--scale", "re:.*dense=f32",
        "--ignore", "*.down_proj", "--ignore", "re:.*shared",
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "lingconv.json").read_text())
    assert record["options"]["fp8"] == {
        "scheme": "block",
        "dialect": "",
        "scale": "ue8m0",
        "scale_rules": [["re:.*dense", "f32"]],
        "scale_dtype": "",
        "ignore": ["*.down_proj", "re:.*shared"],
    }


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["inspect", "nowhere"], 2, "error: nowhere is neither a folder nor a GGUF file"),
        (["convert", "GOLDEN", "OUT", "--dtype", "int3"], 2, "int3"),
        (["convert", "GOLDEN", "OUT", "--max-shard-size", "big"], 2, "`big` is not a size"),
        (["quantize", "GOLDEN", "OUT", "--ignore", "nothing*"], 2, "matches nothing"),
        (["quantize", "GOLDEN", "OUT", "--scheme", "channel", "--dialect", "fp8"], 2, "hint: "),
        (["convert", "GOLDEN", "GOLDEN"], 7, "is inside the source"),
        (["convert", "GOLDEN", "OUT", "--max-memory", "1kB"], 6, "raise `--max-memory`"),
        (["inspect", "."], 3, "holds no *.safetensors file"),
        (["nonsense"], 2, "nonsense"),
        (["synth", "ling-9t", "OUT"], 2, "presets: "),
    ],
)
def test_exit_codes_and_messages(golden, tmp_path, monkeypatch, args, code, says):
    monkeypatch.chdir(tmp_path)
    words = [{"GOLDEN": golden, "OUT": tmp_path / "out"}.get(arg, arg) for arg in args]
    out, err = run(*words, code=code)
    assert out == ""
    assert says in err
    assert "Traceback" not in err


def test_an_error_names_file_and_tensor_and_is_capped(golden, tmp_path):
    source = without_number_of_mtp_layers(golden, tmp_path / "in")
    _, err = run("convert", source, tmp_path / "out", code=3)
    lines = err.splitlines()
    assert lines[1].startswith("  model-00002-of-00003.safetensors: model.layers.2.attention.dense")
    assert lines[11] == "  ... and 29 more (-v shows all)"
    assert "more" not in run("convert", source, tmp_path / "out", "-v", code=3)[1]


def test_a_bug_exits_70_and_asks_for_a_report(golden, tmp_path):
    code = (
        "import sys, lingconv.api\nlingconv.api.inspect = lambda *a, **k: 1 / 0\n"
        f"sys.argv = ['lingconv', 'inspect', {str(golden)!r}]\n"
        "from lingconv.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 70
    assert "ZeroDivisionError" in done.stderr
    assert "please report it" in done.stderr


def test_a_terminal_gets_bars_and_colour(golden, tmp_path):
    code, seen = run_on_terminal("quantize", golden, tmp_path / "out", "--max-shard-size", "1MB")
    assert code == 0, seen
    assert ANSI.search(seen)
    assert "total" in seen
    assert "model-00004-of-00004.safetensors" in seen
    code, seen = run_on_terminal("inspect", tmp_path / "nowhere")
    assert code == 2
    assert "\x1b[1;31merror\x1b[0m" in seen


def test_no_color_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    _, seen = run_on_terminal("inspect", tmp_path / "nowhere")
    assert "\x1b[1;31m" not in seen


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_cleanly_and_the_same_command_resumes(tmp_path, number, code):
    run("synth", "tiny", tmp_path / "in", "--layers", "4", "--dense-layers", "3")
    words = ["convert", tmp_path / "in", tmp_path / "out", "--dtype", "f32", "-j", "1"]
    words += ["--max-shard-size", "2MB"]
    third = Instant("rename", 3, send(number), only="*.safetensors")
    stopped = command(*words, at=third)
    assert stopped.exit_code == code, stopped.err
    assert "run the same command again" in stopped.err
    _, err = run(*words)
    assert re.search(r"resuming: [23] of \d+ files are finished", err)
    assert "nothing odd" in run("inspect", tmp_path / "out")[0]


def test_a_reader_that_goes_away_is_no_error(golden):
    shell = f"{sys.executable} -m lingconv inspect {golden} --json | head -c 1"
    done = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{", "")


def test_small_commands():
    assert "BailingMoeV2ForCausalLM" in run("formats")[0]
    assert json.loads(run("formats", "--json")[0])["presets"][0] == "ling-1t"
    assert "python" in run("env")[0]
    assert run("--version")[0].startswith("lingconv ")


def test_every_command_has_help():
    for each in ("inspect", "plan", "convert", "quantize", "synth", "formats", "env", "diff"):
        out, _ = run(each, "--help")
        assert "--json" in out
        assert "<bool>" not in out, each
    for words in ((), ("merge",), ("merge", "checkpoints"), ("forward",), ("verify",), ("push",)):
        assert "<bool>" not in run(*words, "--help")[0], words


def test_sizes():
    assert parse_size("5GB") == 5_000_000_000
    assert parse_size("1.5 GiB") == 1_610_612_736
    assert parse_size("4k") == 4000
    assert parse_size("7") == 7
    for text in ("", "GB", "5 apples", "-1GB"):
        with pytest.raises(UsageError):
            parse_size(text)
    assert file_size(1_999_410_696_192) == "2.00 TB"
    assert memory_size(1 << 30) == "1.00 GiB"
    assert count(999_705_328_640) == "999.71 B"


def test_gguf_from_the_command_line(golden, golden_channel, tmp_path):
    types = tmp_path / "types.txt"
    types.write_text("token_embd=q6_k\nblk\\.1\\.ffn_up=q5_0\n")
    out = tmp_path / "out.gguf"
    command = ["convert", golden_channel, out, "--outtype", "Q4_K_M", "--tensor-type-file", types]
    stdout, stderr = run(*command, "--split-max-tensors", "30", "--verify", "--json")
    assert json.loads(stdout)["verdict"]["ok"]
    assert "warning: 21 tensors are quantized from FP8" in stderr
    first = tmp_path / "out-00001-of-00002.gguf"
    report = json.loads(run("inspect", first, "--json")[0])
    assert (report["layout"], report["encodings"]["q6_k"]) == ("gguf", 2)
    stdout, stderr = run(*command, "--split-max-tensors", "30")
    assert "nothing to do, all 2 weight files are there" in stdout
    run("convert", first, tmp_path / "back", "--to", "hf", "--dtype", "bf16", "-q")
    stdout, _ = run("verify", first, tmp_path / "back", "--level", "tensors", "-q")
    assert stdout.strip() == "yes"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--outtype", "q4_k_x"], "error: `--outtype` is `q4_k_x`"),
        (["--tensor-type", "ffn"], "hint: write it as `--tensor-type REGEX=TYPE`"),
        (["--tensor-type-file", "nowhere"], "error: nowhere cannot be read"),
        (["--dtype", "fp8"], "not by `--dtype`"),
        (["--to", "hf"], "is the name of a GGUF file, `--to` is hf"),
    ],
)
def test_gguf_requests_that_cannot_be_meant(golden, tmp_path, words, says):
    _, stderr = run("convert", golden, tmp_path / "x.gguf", *words, code=2)
    assert says in stderr
    assert not list(tmp_path.iterdir())
