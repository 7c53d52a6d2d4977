"""What is shipped: the wheel, the public names, the changelog, the layout of the house."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lingconv
from lingconv.encodings.kernels.aot import LEVELS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist as an installer builds it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.long  # a wheel compiles every kernel for every level of processors
def test_the_wheel_from_the_sdist_holds_every_format_file(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for path in (ROOT / "formats").rglob("*"):
            if path.is_file():
                packed = f"lingconv/_formats/{path.relative_to(ROOT / 'formats').as_posix()}"
                assert archive.read(packed) == path.read_bytes()
        assert {"lingconv/py.typed", "lingconv/plans/runtimes.toml"} <= {*names}
        tops = {name.split("/")[0] for name in names}
        assert tops == {"lingconv", f"lingconv-{lingconv.__version__}.dist-info"}
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        "from lingconv.model.family_file import load_families, presets\n"
        "import lingconv\nassert '.whl' in lingconv.__file__\n"
        "print(load_families()[0].name, *presets())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["ling2", "ling-1t", "ling-flash-2.0", "ling-mini-2.0", "tiny"]


@pytest.mark.long
@pytest.mark.skipif(platform.machine() not in LEVELS, reason="no kernels are shipped for it")
def test_an_installed_wheel_compiles_nothing(wheel, tmp_path, golden):
    """The first commands of a fresh install find every kernel that they call."""
    package, cache = tmp_path / "package", tmp_path / "cache"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(package)
    cache.mkdir()

    def lingconv_from_the_wheel(*words):
        subprocess.run(
            [sys.executable, "-m", "lingconv", *map(str, words)],
            env=os.environ | {"PYTHONPATH": str(package), "NUMBA_CACHE_DIR": str(cache)},
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip

    lingconv_from_the_wheel("synth", "tiny", "source")
    lingconv_from_the_wheel("quantize", golden, "fp8", "--fp8")
    lingconv_from_the_wheel("convert", "fp8", "back", "--dtype", "bf16")
    lingconv_from_the_wheel("convert", "fp8", "wide", "--dtype", "f32")
    lingconv_from_the_wheel("quantize", "wide", "fp8-of-f32", "--fp8")
    lingconv_from_the_wheel("verify", golden, "fp8", "--level", "tensors")
    for kind in ("nvfp4", "mxfp4", "int4"):
        lingconv_from_the_wheel("quantize", golden, kind, f"--{kind}")
        lingconv_from_the_wheel("verify", golden, kind, "--level", "tensors")
    lingconv_from_the_wheel("quantize", golden, "46", "--nvfp4", "--search", "four-over-six")
    lingconv_from_the_wheel("convert", golden, "gguf", "--to", "gguf", "--outtype", "q4_k_m")
    lingconv_from_the_wheel("convert", "gguf", "from-gguf", "--to", "hf", "--dtype", "bf16")
    lingconv_from_the_wheel("merge", "checkpoints", golden, "back", "average", "--mean")
    assert (tmp_path / "package/lingconv/encodings/kernels/prebuilt/manifest.json").exists()
    assert [path for path in cache.rglob("*") if path.is_file()] == []

    # ... and without what came with it, the same commands do compile.
    shutil.rmtree(package / "lingconv/encodings/kernels/prebuilt")
    lingconv_from_the_wheel("quantize", golden, "again", "--fp8")
    assert [path for path in cache.rglob("*") if path.is_file()] != []


def test_public_names_are_sorted_and_there():
    assert lingconv.__all__ == sorted(lingconv.__all__)
    assert all(hasattr(lingconv, name) for name in lingconv.__all__)
    assert lingconv.plan is lingconv.api.plan  # and nothing else that has the name
    with pytest.raises(AttributeError, match="no attribute 'spell'"):
        _ = lingconv.spell


def test_importing_lingconv_imports_nothing_that_nobody_asked_for():
    code = (
        "import lingconv, sys\n"
        "before = {name for name in sys.modules if name.startswith('lingconv')}\n"
        "assert before == {'lingconv', 'lingconv.version'}, before\n"
        "from lingconv import CheckpointError\n"
        "assert 'lingconv.api' not in sys.modules\n"
        "from lingconv import *\n"
        "assert convert is lingconv.api.convert and plan is lingconv.api.plan"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_changelog_knows_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == lingconv.__version__


def test_no_family_stands_in_the_code():
    """Nothing in lingconv/ knows the name of a Ling tensor; nothing in formats/ is Python."""
    tensor_name = re.compile(r"query_key_value|word_embeddings|gate_proj|expert_bias\b.*weight")
    for path in (ROOT / "lingconv").rglob("*.py"):
        assert not tensor_name.search(path.read_text()), path
    assert not list((ROOT / "formats").rglob("*.py"))


# Packages may import those of the rows above their own, and no package of their own row.
ORDER = (
    {"errors", "version"},
    {"model", "encodings", "storage"},
    {"plans"},
    {"containers"},
    {"checkpoint"},
    {"planner", "verification", "execution"},
    {"api"},
    {"__init__", "cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# The same within packages: what stands on the left imports nothing of what stands on the right.
APART = (
    ("containers.gguf", "containers.megatron"),
    ("containers.megatron", "containers.gguf"),
    ("containers.hf", "containers.gguf"),
    ("containers.hf", "containers.megatron"),
    ("execution.closing", "execution.publishing"),
    ("execution.pipeline", "execution.publishing"),
    ("encodings.kernels", "encodings.codecs"),
)


def modules():
    """Yield every module of lingconv with the modules of lingconv that it names, lazily or not."""
    for path in sorted((ROOT / "lingconv").rglob("*.py")):
        parts = path.relative_to(ROOT / "lingconv").with_suffix("").parts
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lingconv"):
                inner = (node.module or "").split(".")[1:]
                imported |= {".".join([*inner, alias.name]) for alias in node.names}
            elif isinstance(node, ast.Import):
                own = [a.name for a in node.names if a.name.startswith("lingconv.")]
                imported |= {name.removeprefix("lingconv.") for name in own}
        yield ".".join(parts), imported


def test_packages_import_one_way():
    broken = [
        f"{module} -> {name}"
        for module, imported in modules()
        for name in imported
        if (there := name.split(".")[0]) != (here := module.split(".")[0])
        and RANK[there] >= RANK[here]
    ]
    assert broken == []
    tops = {path.name.removesuffix(".py") for path in (ROOT / "lingconv").iterdir()}
    assert tops - {"__pycache__", "py.typed"} == RANK.keys()


def test_formats_do_not_know_each_other():
    """`hf` is the language that the others may name: both need a config.json."""
    inside = lambda name, package: name == package or name.startswith(package + ".")  # noqa: E731
    broken = [
        f"{module} -> {name}"
        for left, right in APART
        for module, imported in modules()
        for name in imported
        if inside(module, left) and inside(name, right)
    ]
    assert broken == []


def test_there_is_no_circle_of_modules():
    """Not even one that is held apart by imports inside of functions."""
    names = {module.removesuffix(".__init__") for module, _ in modules()}
    graph = {
        module.removesuffix(".__init__"): {
            name if name in names else name.rpartition(".")[0] for name in imported
        }
        & names
        for module, imported in modules()
        if module != "__init__"
    }
    assert list(TopologicalSorter(graph).static_order())


def test_no_package_is_called_like_a_public_verb():
    """Importing it would put the package where the verb is expected: `lingconv.plan`."""
    packages = {path.name for path in (ROOT / "lingconv").iterdir() if path.is_dir()}
    assert not packages & set(lingconv.__all__)


def test_planning_imports_no_numbers():
    code = (
        "import sys, lingconv.planner.planner, lingconv.containers.registry as registry\n"
        "list(registry.built_in())\n"
        "print(*{'numpy', 'numba', 'torch', 'huggingface_hub', 'gguf'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_only_the_command_line_prints():
    for path in (ROOT / "lingconv").rglob("*.py"):
        if "cli" not in path.parts and path.name != "__main__.py":
            assert "lingconv.cli" not in path.read_text(), path
