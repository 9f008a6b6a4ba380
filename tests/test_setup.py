"""run.sh finds a Python that has what a command needs, or makes one: with a python3 that stands in
for venv and pip, and answers what is installed as the real one does."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Its packages are the folders of site/ beside it. Of those it installs, each takes a line of `log`;
# it ends before the one that $CUT names, which is left in pieces; $KILL may end run.sh as well.
PYTHON = f"""#!/usr/bin/env bash
site="$(dirname "$0")/site" log="{{log}}"
case "$1 $2 $3" in
"-I -m venv") echo "venv $4" >>"$log"; mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
"-I -m pip")
    cat "$(dirname "${{@: -1}}")"/requirements.txt "${{@: -1}}" | grep '^[a-z]' | sort -u |
    while IFS='>=' read -r name _ version; do
        [[ "$name" != "${{CUT:-}}" ]] || {{ touch "$site/pieces"; ${{KILL:-false}} $PPID; exit 1; }}
        echo "pip $name" >>"$log"
        folder="$site/${{name//-/_}}-$version.dist-info"
        mkdir -p "$folder"
        printf 'Name: %s\\nVersion: %s\\n' "$name" "$version" >"$folder/METADATA"
    done ;;
*) [[ "$1" != -I ]] || shift; PYTHONPATH="$site" exec {sys.executable} -S "$@" ;;
esac
"""


@pytest.fixture
def bare(tmp_path):
    """A checkout of run.sh alone, whose programs say which Python runs them, and a bare python3."""
    for name in ("run.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for program in ("tests/all.py", "pipeline/__main__.py"):
        path = tmp_path / program
        path.parent.mkdir()
        path.write_text("import sys; print('by', *sys.path[1:2])")
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(PYTHON.replace("{log}", str(tmp_path / "log")))
    python.chmod(0o755)
    return tmp_path


def run(bare, *words, **environment):
    """Status, whether .venv's Python ran, what was installed, and what was said."""
    (bare / "log").write_text("")
    done = subprocess.run(
        ["bash", bare / "run.sh", *words], capture_output=True, text=True, cwd=bare,
        env=dict(PATH=f"{bare}/bin:/usr/bin:/bin", HOME=str(bare / "home")) | environment)
    assert "Traceback" not in done.stderr, done.stderr
    installed = sorted((bare / "log").read_text().splitlines(), reverse=True)
    return done.returncode, f"by {bare}/.venv" in done.stdout, installed, done.stderr


def packages(*files):
    text = "".join((ROOT / name).read_text() for name in files)
    return sorted(re.findall("^[a-z][a-z0-9_-]*", text, re.M), reverse=True)


def give(bare, **versions):
    """Packages of the active Python."""
    for name, version in versions.items():
        folder = bare / "bin" / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


RUN, TEST = ["requirements.txt"], ["requirements.txt", "requirements-dev.txt"]


def test_it_is_made_once_and_completed_for_the_tests(bare):
    status, in_venv, installed, stderr = run(bare, "attack", "x")
    assert (status, in_venv) == (0, True) and installed[0] == f"venv {bare}/.venv"
    assert installed[1:] == [f"pip {name}" for name in packages(*RUN)]
    assert f"installing the packages of requirements.txt into {bare}/.venv" in stderr
    assert run(bare, "attack", "x") == (0, True, [], "")
    status, in_venv, installed, stderr = run(bare, "test")
    assert (status, in_venv) == (0, True) and "the packages of requirements-dev.txt" in stderr
    assert installed[1:] == [f"pip {name}" for name in packages(*TEST)]
    assert run(bare, "test") == run(bare, "attack", "x") == (0, True, [], "")


@pytest.mark.parametrize("kill, at", [("false", "tqdm"), ("kill -9", "tqdm"),
                                      ("kill -9", "transformers")])
def test_one_that_was_cut_off_is_made_again(bare, kill, at):
    """Also where all that the command needs is there by name, for it may be in pieces."""
    status, in_venv, installed, stderr = run(bare, "test", CUT=at, KILL=kill)
    assert not in_venv and f"pip {at}" not in installed and "pip sentencepiece" in installed
    if kill == "false":
        assert status == 2 and stderr.splitlines()[-1].startswith("error: no Python environment: ")
    assert (bare / ".venv/bin/site/pieces").exists()
    for command in (["attack", "x"], ["test"]):
        status, in_venv, installed, stderr = run(bare, *command)
        assert (status, in_venv) == (0, True) and not (bare / ".venv/bin/site/pieces").exists()
    assert run(bare, "test") == (0, True, [], "")


def test_one_that_is_being_made_is_left_alone(bare):
    run(bare, "attack", "x", CUT="tqdm")
    (bare / ".venv/unfinished").write_text(f"{os.getpid()}\n")
    status, in_venv, installed, stderr = run(bare, "attack", "x")
    assert (status, in_venv, installed) == (2, False, []) and stderr.splitlines()[-1] == (
        f"error: process {os.getpid()} is making {bare}/.venv; wait for it, or delete "
        "that folder")
    assert (bare / ".venv/bin/site/pieces").exists()


def test_the_users_own_is_completed_and_never_removed(bare):
    (bare / ".venv").mkdir()
    (bare / ".venv/mine").write_text("the only copy")
    assert run(bare, "test", CUT="tqdm")[0] != 0
    assert run(bare, "test")[:2] == (0, True)
    assert (bare / ".venv/mine").read_text() == "the only copy"


LEAST = dict(torch="2.5.1+cu124", sentencepiece="0.2.0", safetensors="0.10.0", tqdm="4.66.1")


def test_the_active_python_is_taken_where_it_has_all(bare):
    give(bare, **LEAST)
    assert run(bare, "attack", "x") == (0, False, [], "")
    rest = {name: "99" for name in packages(*TEST) if name not in LEAST}
    missing = rest.popitem()[0]
    give(bare, **rest)
    assert run(bare, "test")[1]
    shutil.rmtree(bare / ".venv")
    give(bare, **{missing: "99"})
    assert run(bare, "test") == (0, False, [], "")


@pytest.mark.parametrize("name, version", [("torch", "2.4.9"), ("safetensors", "0.4.2")])
def test_an_older_one_will_not_do(bare, name, version):
    give(bare, **LEAST | {name: version})
    assert run(bare, "attack", "x")[1]


def test_a_python_without_venv_ends_in_a_line(bare):
    (bare / "bin/site").mkdir()
    (bare / "bin/site/ensurepip.py").write_text("raise ImportError")
    status, in_venv, installed, stderr = run(bare, "test")
    assert (status, installed) == (2, []) and not (bare / ".venv").exists()
    assert re.fullmatch("error: no Python .* requirements-dev.txt\n", stderr), stderr
