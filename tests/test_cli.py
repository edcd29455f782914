"""The command line: what it says, what it exits with, and that --json is JSON and nothing else."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from attlas.catalogue.index import card, cards
from attlas.cli import app as attlas_app
from attlas.cli.app import app
from attlas.models.config import language_model
from attlas.models.transformer import Transformer


def attlas(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def answer(*arguments: str) -> Any:
    """What a command with --json says; anything else on stdout would not parse."""
    done = attlas(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*arguments: str) -> str:
    """The sentence with which a command refuses: exit 2, nothing on stdout, no traceback."""
    done = attlas(*arguments)
    assert done.exit_code == 2, (done.exit_code, done.output)
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr


def shell(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "attlas", *arguments], capture_output=True, text=True, **options)


COMMANDS = (
    "list",
    "show",
    "draw",
    "explain",
    "compare",
    "generate",
    "chat",
    "serve",
    "bench masks",
    "bench attention",
    "bench scan",
    "bench scaling",
    "bench serve",
)


# ---- the whole


def test_help_names_every_command_and_loads_no_torch():
    script = (
        "import sys; sys.argv = ['attlas', '--help']\n"
        "from attlas.cli import main\n"
        "code = main()\n"
        "heavy = {'torch', 'numpy', 'transformers', 'plotly', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 5  # importing torch alone takes seconds where this takes tenths
    assert all(command.split()[0] in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str):
    done = attlas(*command.split(), "--help")
    assert done.exit_code == 0, done.output
    assert done.stdout.count(f"attlas {command}") >= 2, "an example beside the usage line"
    assert "--json" in done.stdout


@pytest.mark.parametrize("command", ["list_", "show", "draw", "explain"])
def test_examples_of_the_help_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^ +attlas (.+)$", getattr(attlas_app, command).__doc__, flags=re.M)
    assert len(examples) >= 3
    for example in examples:
        done = attlas(*shlex.split(example))
        assert done.exit_code == 0, f"{example}\n{done.output}"


def test_version():
    from attlas import __version__

    assert attlas("--version").stdout == f"attlas {__version__}\n"


def test_mistyped_command_is_refused():
    assert "lst" in refused("lst")


def test_script_exits_with_the_codes_it_promises():
    assert shell("list", "--json").returncode == 0
    wrong = shell("show", "sliding-windo")
    assert wrong.returncode == 2
    assert wrong.stdout == "" and len(wrong.stderr.strip().splitlines()) == 1
    assert "did you mean 'sliding-window'" in wrong.stderr


def test_interrupt_is_one_line_and_130():
    script = (
        "import sys, time; sys.argv = ['attlas', 'list']\n"
        "import attlas.cli.catalogue as catalogue\n"
        "def slow(**_):\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
        "catalogue.list_cards = slow\n"
        "from attlas.cli import main\n"
        "sys.exit(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "Interrupted."


# ---- list and show


def test_list_is_the_catalogue():
    assert [c["name"] for c in answer("list")] == [c.name for c in cards()]
    text = attlas("list").stdout
    assert all(c.name in text for c in cards())


def test_list_filters():
    found = answer("list", "--supports", "decode", "--supports", "causal", "--level", "2", "--family", "core")
    assert [c["name"] for c in found] == [c.name for c in cards(family="core", supports=("decode", "causal"), min_level=2)]
    assert 0 < len(found) < len(cards())


@pytest.mark.parametrize(("option", "value", "meant"), [("--family", "cor", "core"), ("--supports", "decod", "decode")])
def test_list_refuses_unknown_filters(option: str, value: str, meant: str):
    assert meant in refused("list", option, value)


def test_list_markdown_has_a_row_for_each_card():
    lines = attlas("list", "--markdown").stdout.strip().splitlines()
    assert len(lines) == 2 + len(cards())
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


@pytest.mark.parametrize("name", [c.name for c in cards()])
def test_show_knows_every_mechanism(name: str):
    found = answer("show", name)
    assert found["formula"] == card(name).formula
    for kind in ("reference", "op", "mixer"):
        at = found["files"][kind]
        if at is not None:
            source = Path(__file__).resolve().parents[1] / "src" / at["file"]
            line = source.read_text(encoding="utf-8").splitlines()[at["line"] - 1]
            assert at["name"].partition(":")[2] in line or line.startswith("@"), line


def test_show_prints_formula_files_and_pattern():
    text = attlas("show", "sliding-window").stdout
    assert card("sliding-window").formula.splitlines()[0].strip() in text
    assert "attlas/nn/patterns.py:" in text


def test_show_says_what_letters_and_options_mean():
    text = attlas("show", "bigbird").stdout
    assert "d width of all heads together, d_h of one head" in text
    assert "block          tokens per block" in text and "attlas.nn.attention.Attention" in text


# ---- draw


def test_draw_in_the_terminal_shows_the_pattern():
    found = answer("draw", "Causal()", "--size", "3")
    assert found["allowed"] == 6 and found["pairs"] == 9
    assert found["cells"] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert len(attlas("draw", "Causal()", "--size", "31").stdout.splitlines()) > 15


def test_draw_is_not_limited_by_length():
    n = 1_000_003
    found = answer("draw", "Causal() & Window.last(3)", "--size", str(n))
    assert found["allowed"] == 3 * n - 3


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<svg"), ("png", b"\x89PNG\r\n\x1a\n"), ("txt", b"")])
def test_draw_writes_files(tmp_path: Path, suffix: str, start: bytes):
    file = tmp_path / "deep" / f"picture.{suffix}"
    found = answer("draw", "sliding-window", "--set", "window=5", "--size", "37", "-o", str(file))
    assert found["file"] == str(file)
    assert file.read_bytes().startswith(start) and file.stat().st_size > 50


def test_draw_takes_the_mechanisms_options():
    few, many = (answer("draw", "sliding-window", "--set", f"window={w}", "--size", "31")["allowed"] for w in (3, 7))
    assert (few, many) == (31 * 3 - 3, 31 * 7 - 21)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("slidin-window",), "did you mean"),
        (("Causl() & Window(3, 0)",), "'Causal'"),
        (("sliding-window", "--set", "windw=3"), "window"),
        (("sliding-window", "--set", "window"), "NAME=VALUE"),
        (("Causal()", "--set", "window=3"), "--set"),
        (("Causal()", "-o", "picture.gif"), ".svg"),
        (("Window(-1, 0)",), "Window"),
    ],
)
def test_draw_refuses(arguments: tuple[str, ...], says: str):
    assert says in refused("draw", *arguments)


# ---- explain


def test_explain_says_what_runs_and_why_not_the_others():
    found = answer("explain", "--q-len", "31", "--heads", "6", "--kv-heads", "2", "--mask", "Causal() & Window.last(7)", "--lse")
    text = json.dumps(found)
    assert "reference" in text and "blocked" in text and "sdpa" in text
    assert attlas("explain", "--shape", "2,1,6,16", "--k-len", "8192").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--mask", "Causl()"), "'Causal'"),
        (("--dtype", "flot32"), "float32"),
        (("--heads", "6", "--kv-heads", "4"), "4"),
        (("--shape", "2,3"), "B,T,H,D"),
        (("--impl", "refrence"), "reference"),
        (("--q-len", "0"), "q-len"),
    ],
)
def test_explain_refuses(arguments: tuple[str, ...], says: str):
    assert says in refused("explain", *arguments)


# ---- compare


def test_compare_measures_and_says_where_the_report_is(tmp_path: Path):
    small = ("--stages", "cache", "--layer-dim", "16", "--heads", "2", "--minutes", "0.05")
    out = ("--out", str(tmp_path / "here"))
    found = answer("compare", "causal", "sliding-window:window=5", *small, *out)
    assert [row["status"] for row in found["rows"]] == ["ok", "ok"]
    assert found["rows"][1]["cache_bytes"] < found["rows"][0]["cache_bytes"]
    again = attlas("compare", "causal", "sliding-window:window=5", *small, *out)
    assert again.exit_code == 0, again.output
    assert "sliding-window" in again.stdout and "cache KiB" in again.stdout
    assert Path(again.stdout.partition("report: ")[2].split()[0]).is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("causl",), "'causal'"), (("--stages", "sped"), "'speed'"), (("--lengths", "many"), "int"), (("--dim", "0"), "--dim")],
)
def test_compare_refuses(arguments: tuple[str, ...], says: str):
    assert says in refused("compare", *arguments)


# ---- bench


def test_bench_masks_measures():
    small = ("--tokens", "1024", "--peer-tokens", "256", "--repeats", "1", "--no-rss")
    found = answer("bench", "masks", *small)
    assert found["peer"]["agree"] is True
    assert {row["tokens"] for row in found["long"]} == {1024}
    assert "times faster" in attlas("bench", "masks", *small).stdout


def test_bench_attention_takes_the_names_of_its_cases():
    assert "fp32 causal" in refused("bench", "attention", "--only", "no such case")


# ---- generate


def test_generate_continues_each_prompt_alone():
    asked = ("--mechanism", "sliding-window", "--set", "window=5", "--new-tokens", "7", "--temperature", "1")
    both = answer("generate", "ab", "Hello, world", *asked)
    assert [r["prompt"] for r in both] == ["ab", "Hello, world"]
    assert [len(r["ids"]) for r in both] == [7, 7]
    assert answer("generate", "ab", *asked)[0] == both[0]
    assert answer("generate", "ab", *asked, "--seed", "1")[0] != both[0]


def test_generate_prints_prompt_and_continuation():
    done = attlas("generate", "7,11", "--ids", "--new-tokens", "3")
    assert re.fullmatch(r"7,11(,\d+){3}\n", done.stdout)
    assert "random" in done.stderr


def test_generate_with_a_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": [0, 1, 2]}')
    model = Transformer(language_model(3, 8, 1, 2), seed=1)
    monkeypatch.setattr("attlas.models.load.load_model", lambda path: model)
    found = answer("generate", "a b b", "--model", str(tmp_path))[0]
    assert found["prompt_ids"] == [0, 1, 1]
    assert len(found["ids"]) == 1 and found["text"] in (" a", " b", " ?")  # every token ends a sequence here


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "prompt"),
        (("x", "--mechanism", "causl"), "'causal'"),
        (("x", "--mechanism", "full"), "not causal"),
        (("x", "--set", "bis=1"), "'bias'"),
        (("x", "--ids"), "1,2,3"),
        (("256", "--ids"), "vocabulary of 256"),
        (("x", "--model", "no-such-folder"), "does not exist"),
        (("1", "--ids", "--model", "no-such-folder"), "no-such-folder"),
        (("x", "--model", "no-such-folder", "--mechanism", "full"), "--mechanism"),
        (("x", "--top-k", "3"), "temperature"),
    ],
)
def test_generate_refuses(arguments: tuple[str, ...], says: str):
    assert says in refused("generate", *arguments)
