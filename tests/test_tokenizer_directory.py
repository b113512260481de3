"""Tokenizers of Hugging Face directories as people have them: what counts, what is carried on, what is refused."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from ramp_jax.models import load_model
from ramp_jax.models.metadata import plain, typed
from ramp_jax.models.tokenizers import pre, tokenizer_from_directory, tokenizer_from_gguf

sys.path.append(str(Path(__file__).parent.parent / "launch"))
from benchmarks import tokenizers as suite
from benchmarks.tokenizer_kinds import KINDS, VOCABULARY, lines

KEY = "tokenizer.ggml.{}".format
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def directory(folder, name="Llama-3", config=None, change=None, files=None):
    """A kind's directory with more in its config, its backend changed, and other files (text, or JSON) beside."""
    KINDS[name].build(folder)
    if config:
        path = folder / "tokenizer_config.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | config))
    if change:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend = change(backend) or backend
        backend.save(str(folder / "tokenizer.json"))
    for file, content in (files or {}).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def read(folder, vocab_size=VOCABULARY):
    tokenizer, pairs = tokenizer_from_directory(folder, vocab_size)
    return tokenizer, plain(pairs)


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "no.RemoteCode"])
@pytest.mark.parametrize("name", ["Llama-3", "Qwen2", "SmolLM", "GPT-2"])
def test_the_class_that_a_config_names_changes_nothing(tmp_path, name, tokenizer_class):
    more = {"tokenizer_class": tokenizer_class, "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    tokenizer, fields = read(directory(tmp_path, name, more))
    assert fields[KEY("pre")] == KINDS[name].pre
    theirs = suite.hugging_face(tmp_path)
    assert all(tokenizer(text)["input_ids"] == theirs(text) for text in lines((), 100))


@pytest.fixture(scope="module")
def pairs_of_bytes():
    """Vocabulary of bytes and of many pairs of them, so that ids show where a text is cut."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng = np.random.default_rng(0)
    pairs = [(a, b) for a in letters for b in letters]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))[:30_000]]
    tokens = letters + [a + b for a, b in pairs]
    return {
        KEY("model"): "gpt2",
        KEY("tokens"): tokens,
        KEY("token_type"): np.ones(len(tokens), np.int32),
        KEY("merges"): [f"{a} {b}" for a, b in pairs],
        KEY("add_bos_token"): False,
    }


@pytest.mark.parametrize("name", {known.splits: name for name, known in pre.PRE_TOKENIZERS.items()}.values())
def test_every_name_cuts_as_llama_cpp_does(tmp_path, pairs_of_bytes, name):
    pairs = typed(pairs_of_bytes | {KEY("pre"): name})
    ours = tokenizer_from_gguf(plain(pairs), tmp_path)
    rng = np.random.default_rng(1)
    alphabet = [
        *"aZsStTéÉ字ªʰ",
        "\u0301",
        *"0129²Ⅷ٣",
        *".,'/(<$`€🙂",
        "'ll",
        "'Ve",
        "'S",
        *" \t\n\r\x85\xa0",
        "  ",
        "\r\n",
        "12345",
    ]
    with suite.llama_cpp(suite.write_vocabulary(tmp_path / "v.gguf", pairs)) as encode:
        for _ in range(300):
            text = "".join(rng.choice(alphabet, 40))
            assert ours(text)["input_ids"] == encode(text)


@pytest.mark.parametrize(
    ("name", "change", "vocab_size", "message"),
    [
        ("Llama-3", lambda b: setattr(b, "normalizer", normalizers.NFC()), VOCABULARY, "no pre-tokenizer that cuts"),
        (
            "GPT-2",
            lambda b: setattr(b, "normalizer", normalizers.Lowercase()),
            VOCABULARY,
            "no pre-tokenizer that cuts",
        ),
        (
            "GPT-2",
            lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
            VOCABULARY,
            "no pre-tokenizer that cuts",
        ),
        ("GPT-2", lambda b: setattr(b.model, "dropout", 0.1), VOCABULARY, "its merges drop out at random"),
        ("GPT-2", lambda b: Tokenizer(models.Unigram([("a", -1.0)])), VOCABULARY, "no vocabulary of type Unigram"),
        ("GPT-2", lambda b: Tokenizer(models.WordPiece({"a": 0})), VOCABULARY, "no vocabulary of type WordPiece"),
        ("GPT-2", lambda b: Tokenizer(models.BPE({"a": 0}, [])), VOCABULARY, "it has no merges"),
        ("Llama-2", lambda b: setattr(b, "normalizer", normalizers.NFKC()), VOCABULARY, "it changes texts in a way"),
        (
            "Llama-2",
            lambda b: setattr(b, "normalizer", normalizers.Sequence([b.normalizer, normalizers.Replace("king", "q")])),
            VOCABULARY,
            "it changes texts in a way",
        ),
        (
            "GPT-2",
            lambda b: setattr(
                b,
                "pre_tokenizer",
                pre_tokenizers.Sequence([pre_tokenizers.Split("king", behavior="isolated"), b.pre_tokenizer]),
            ),
            VOCABULARY,
            "no pre-tokenizer that cuts",
        ),
        (
            "Llama-3",
            lambda b: setattr(
                b,
                "post_processor",
                processors.TemplateProcessing(
                    single="<|begin_of_text|> <|eot_id|> $A",
                    special_tokens=[(t, b.token_to_id(t)) for t in ("<|begin_of_text|>", "<|eot_id|>")],
                ),
            ),
            VOCABULARY,
            "it puts more around texts than one token",
        ),
    ],
)
def test_what_gguf_cannot_express_names_the_way_out(tmp_path, name, change, vocab_size, message):
    with pytest.raises(ValueError, match=rf"{message}.*--tokenizer_from=FILE\.gguf"):
        read(directory(tmp_path, name, change=change), vocab_size)


def test_vocabulary_is_filled_up_and_never_cut(tmp_path):
    count = Tokenizer.from_file(str(directory(tmp_path) / "tokenizer.json")).get_vocab_size()
    _, fields = read(tmp_path, count + 2)
    assert fields[KEY("tokens")][-2:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
    assert fields[KEY("token_type")][-3:] == [3, 5, 5]
    with pytest.raises(ValueError, match=rf"its tokenizer has {count} tokens, the model a vocabulary of {count - 1};"):
        read(tmp_path, count - 1)


def test_directory_without_a_tokenizer(tmp_path):
    assert tokenizer_from_directory(tmp_path, 8) is None


TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
LISTED = [{"name": name, "template": text} for name, text in TEMPLATES.items()]
CARRIED = {
    "tokenizer.chat_template": "{{ messages }}",
    "tokenizer.chat_template.tool_use": "{{ tools }}",
    "tokenizer.chat_templates": ["tool_use"],
}
ONE = {"tokenizer.chat_template": "{{ messages }}"}


@pytest.mark.parametrize(
    ("config", "files", "carried"),
    [
        ({"chat_template": "{{ messages }}"}, {}, ONE),
        ({"chat_template": LISTED}, {}, CARRIED),
        ({"chat_template": LISTED[:1]}, {}, ONE),
        ({"chat_template": [{"name": "tool use", "template": "x"}]}, {}, {"tokenizer.chat_template.tool_use": "x"}),
        ({"chat_template": "old"}, {"chat_template.jinja": "{{ messages }}"}, ONE),
        ({}, {"chat_template.json": {"chat_template": "{{ messages }}"}}, ONE),
        (
            {},
            {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/tool_use.jinja": "{{ tools }}"},
            CARRIED,
        ),
        ({}, {}, {}),
    ],
)
def test_chat_templates_are_carried_on(tmp_path, config, files, carried):
    tokenizer, fields = read(directory(tmp_path, config=config, files=files))
    found = {key: value for key, value in fields.items() if "chat_template" in key}
    assert found.items() >= carried.items()
    assert set(found) - set(carried) <= {"tokenizer.chat_templates"}
    path = suite.write_vocabulary(tmp_path / "v.gguf", tokenizer_from_directory(tmp_path, VOCABULARY)[1])
    again = tokenizer_from_gguf(fields, path)
    if "tokenizer.chat_template" in carried:
        chat = [{"role": "user", "content": "a"}]
        asked = {"conversation": chat, "tools": [{"name": "f"}], "tokenize": False}
        for named in ({}, {"chat_template": "tool_use"} if len(carried) > 1 else {}):
            assert again.apply_chat_template(**asked, **named) == tokenizer.apply_chat_template(**asked, **named)


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"generation_config.json": {"eos_token_id": [7, 9, 11]}}, [7, 9]),
        ({"config.json": {"eos_token_id": [7, 9]}}, [7, 9]),
        ({"config.json": {"text_config": {"eos_token_id": 7}}}, [7]),
        ({"generation_config.json": {"eos_token_id": [7, 2**40, -1]}, "config.json": {"eos_token_id": 9}}, [7, 9]),
        ({"generation_config.json": {"eos_token_id": True}}, []),
    ],
)
def test_every_end_of_an_answer_ends_it_in_llama_cpp(tmp_path, files, ids):
    """As many as llama.cpp has keys for beside EOS: the end of a turn and of a message."""
    tokenizer, pairs = tokenizer_from_directory(directory(tmp_path, "Mistral", files=files), VOCABULARY)
    assert plain(pairs)[KEY("eos_token_id")] == tokenizer.eos_token_id
    with suite.vocabulary(suite.write_vocabulary(tmp_path / "v.gguf", pairs)) as (library, vocabulary):
        ends = [i for i in range(VOCABULARY) if library.llama_vocab_is_eog(vocabulary, i)]
    assert ends == sorted({tokenizer.eos_token_id, *ids})


def test_end_of_a_message_is_known_by_its_name(tmp_path):
    more = {"additional_special_tokens": ["<|eom_id|>"], "eos_token": "<|eot_id|>"}
    directory(tmp_path, config=more)
    tokenizer, _ = read(tmp_path)
    turn, message, text = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [message, text, turn]}))
    _, fields = read(tmp_path)
    assert [fields[KEY(f"{end}_token_id")] for end in ("eos", "eot", "eom")] == [turn, text, message]


@pytest.mark.parametrize(
    ("name", "rule", "config", "added"),
    [
        ("Llama-3", True, {"add_bos_token": False}, (True, False)),
        ("Llama-3", False, {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("Llama-3", False, {}, (False, False)),
        ("Llama-2, tokenizer.model", None, {}, (True, False)),
        ("Llama-2, tokenizer.model", None, {"add_bos_token": False, "add_eos_token": True}, (False, True)),
    ],
)
def test_bos_and_eos_are_added_by_the_rule_that_is_stored_and_else_by_the_config(tmp_path, name, rule, config, added):
    def drop(backend):
        saved = json.loads(backend.to_str()) | {"post_processor": None}
        return Tokenizer.from_str(json.dumps(saved))

    tokenizer, fields = read(directory(tmp_path, name, config, drop if rule is False else None))
    assert (fields[KEY("add_bos_token")], fields[KEY("add_eos_token")]) == added
    around = tokenizer("a")["input_ids"]
    assert (around[0] == tokenizer.bos_token_id, around[-1] == tokenizer.eos_token_id) == added


def test_eos_that_the_rule_adds_is_the_eos(tmp_path):
    """As for Qwen3's embeddings: the token behind texts is not the one that ends a turn."""

    def ended(backend):
        end = "<|endoftext|>"
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, backend.token_to_id(end))]
        )

    tokenizer, fields = read(directory(tmp_path, "Qwen2", {"eos_token": "<|im_end|>"}, ended))
    end, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert (fields[KEY("eos_token_id")], fields[KEY("eot_token_id")], fields[KEY("add_eos_token")]) == (end, turn, True)


def test_ids_of_bos_and_eos_in_the_model_s_config_count_where_the_tokenizer_names_none(tmp_path):
    files = {"tokenizer_config.json": {}, "config.json": {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": -1}}
    _, fields = read(directory(tmp_path, "GPT-2", files=files))
    assert (fields[KEY("bos_token_id")], fields[KEY("eos_token_id")]) == (5, 6)
    assert KEY("padding_token_id") not in fields


def test_tokens_beside_a_sentencepiece_model(tmp_path):
    """Some after the last piece, with a hole between, and one in place of a piece."""
    name = "Llama-2, tokenizer.model"
    count = len(tokenizer_from_directory(directory(tmp_path, name), VOCABULARY)[0])
    decoder = {str(count): {"content": "<|user|>", "special": True}, "500": {"content": "▁▁new", "special": False}}
    files = {"added_tokens.json": {"<tool>": count + 2}}
    directory(tmp_path, name, {"added_tokens_decoder": decoder}, files=files)
    tokenizer, pairs = tokenizer_from_directory(tmp_path, VOCABULARY)
    fields = plain(pairs)
    assert [fields[KEY("tokens")][i] for i in (500, count, count + 1, count + 2)] == [
        *("  new", "<|user|>", f"[PAD{count + 1}]", "<tool>"),
    ]
    assert [fields[KEY("token_type")][i] for i in (500, count, count + 1, count + 2)] == [4, 3, 5, 4]
    with suite.llama_cpp(suite.write_vocabulary(tmp_path / "v.gguf", pairs)) as encode:
        for text in lines(("<|user|>", "<tool>", "  new"), 300):
            assert tokenizer(text)["input_ids"] == encode(text)


def pieces_alone(folder, change, config=None):
    """A directory of `tokenizer.model` alone, whose pieces are changed."""
    path = directory(folder, "Llama-2, tokenizer.model", config) / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    change(model.pieces)
    path.write_bytes(model.SerializeToString())
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, r"has type 1 and score nan, which do not fit"),
        ({"type": 6}, "has type 6 and score .*, which do not fit"),
        ({"type": 2}, "has two pieces for what is unknown"),
        ({"piece": "ab" * 300}, "has 600 characters, of which 512 can merge"),
    ],
)
def test_pieces_that_do_not_fit_are_named(tmp_path, change, message):
    def set_one(pieces):
        for key, value in change.items():
            setattr(pieces[600], key, value)

    with pytest.raises(ValueError, match=message):
        tokenizer_from_directory(pieces_alone(tmp_path, set_one), VOCABULARY)


def test_token_that_llama_cpp_would_make_and_no_merge_does(tmp_path):
    path = directory(tmp_path, "Llama-2") / "tokenizer.json"
    saved = json.loads(path.read_text())
    last = "".join(saved["model"]["merges"][-1])
    saved["model"]["merges"] = [merge for merge in saved["model"]["merges"] if "".join(merge) != last]
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"no merge makes '{last}', which llama.cpp would make of its parts; take"):
        read(tmp_path)


def test_error_of_a_library_in_rust_is_one_of_the_file(untied_directory, monkeypatch):
    class PanicException(BaseException):
        pass

    def panics(*_):
        raise PanicException("range end index 12 out of range")

    monkeypatch.setattr("ramp_jax.models.load.tokenizer_from_directory", panics)
    with pytest.raises(ValueError, match=r"its tokenizer cannot be read \(range end index 12 out of range\); download"):
        load_model(untied_directory)


def test_types_of_pieces_are_kept(tmp_path):
    def change(pieces):
        for i, kind in ((600, 5), (601, 5), (602, 4), (603, 3)):
            pieces[i].type = kind

    word = read(directory(tmp_path, "Llama-2, tokenizer.model"))[1][KEY("tokens")][604]
    tokenizer, pairs = tokenizer_from_directory(pieces_alone(tmp_path, change, {"pad_token": word}), VOCABULARY)
    assert plain(pairs)[KEY("token_type")][599:606] == [1, 5, 5, 4, 3, 3, 1]
    with suite.llama_cpp(suite.write_vocabulary(tmp_path / "v.gguf", pairs)) as encode:
        for text in lines(plain(pairs)[KEY("tokens")][600:605], 300):
            assert tokenizer(text)["input_ids"] == encode(text)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("asked", [True, False, None])
def test_space_in_front_of_texts_is_as_the_config_has_it_and_else_as_the_pieces(tmp_path, own, asked):
    path = directory(tmp_path, "Llama-2, tokenizer.model", {"add_prefix_space": asked}) / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = own
    path.write_bytes(model.SerializeToString())
    tokenizer, fields = read(tmp_path)
    prefix = own if asked is None else asked
    assert fields[KEY("add_space_prefix")] is prefix
    assert tokenizer.tokenize("the end")[0].startswith("▁") is prefix


def test_space_in_front_of_texts_is_a_bool(tmp_path):
    directory(tmp_path, "Llama-2, tokenizer.model", {"add_prefix_space": "false"})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: add_prefix_space is 'false'; write true or false"):
        read(tmp_path)


def test_a_piece_that_stands_there_twice_is_refused(tmp_path):
    """llama.cpp does not survive such a file."""
    pieces_alone(tmp_path, lambda pieces: setattr(pieces[700], "piece", pieces[660].piece))
    with pytest.raises(ValueError, match="stands in the vocabulary twice"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json is no JSON file"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a JSON list, no object"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is no JSON file"),
        ("tokenizer_config.json", "[" * 100_000, r"tokenizer_config\.json is no JSON file"),
        ("tokenizer_config.json", LFS_POINTER, r"tokenizer_config\.json is a Git-LFS pointer"),
        ("tokenizer.json", LFS_POINTER, r"tokenizer\.json is a Git-LFS pointer"),
        ("tokenizer_config.json", {"bos_token": 1}, "bos_token is 1, not a token"),
        ("tokenizer_config.json", {"bos_token": {"id": 1}}, "bos_token is {'id': 1}, not a token"),
        ("tokenizer_config.json", {"chat_template": 1}, "chat template 'default' is not text"),
        ("tokenizer_config.json", {"chat_template": ["a"]}, "chat_template is a list without names"),
        ("tokenizer_config.json", {"additional_special_tokens": "a"}, "is 'a', not a list of tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(2**31): {"content": "a"}}}, "'2147483648' is no id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "zz"}}}, "and 0 beside it"),
        ("chat_template.json", {"chat_template": 1}, "chat template 'default' is not text"),
        ("config.json", "[]", r"config\.json holds a JSON list, no object"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, message):
    with pytest.raises(ValueError, match=message):
        read(directory(tmp_path, files={file: content}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["added_tokens"][0].update(id=2**31), "its tokenizer has 2,147,483,649 tokens"),
        (lambda saved: saved["model"]["vocab"].update(a=2**31), "its tokenizer has 2,147,483,649 tokens"),
        (lambda saved: saved["model"]["merges"].append(["no", "such"]), "damaged .*merge 'no such' is not of two"),
        (lambda saved: saved["model"]["merges"].append(saved["model"]["merges"][0]), "stands there twice"),
        (lambda saved: saved["model"]["merges"].append(7), "merge 7 is not of two tokens"),
        (lambda saved: saved["model"]["vocab"].update(a=3), "3 is the id of two tokens"),
        (lambda saved: saved["model"]["vocab"].update(a=-1), "the id of 'a' is -1, a number from 0"),
        (lambda saved: saved["added_tokens"].append({"id": 5, "content": ""}), "added token .* has no text"),
        (lambda saved: saved["model"]["vocab"].pop("ÿ"), "which becomes .*, since ids before it are missing"),
        (lambda saved: saved["model"].update(vocab=[1]), "is damaged"),
    ],
)
def test_damaged_vocabularies_are_named(tmp_path, change, message):
    path = directory(tmp_path) / "tokenizer.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_vocabulary_with_holes(tmp_path):
    """What merges need none of may be missing: such ids are unused."""
    path = directory(tmp_path, "GPT-2") / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["model"]["vocab"] |= {token["content"]: token["id"] for token in saved["added_tokens"]}
    saved["model"]["vocab"].pop("ÿ")
    path.write_text(json.dumps(saved))
    _, fields = read(tmp_path)
    hole = fields[KEY("token_type")].index(5)
    assert fields[KEY("tokens")][hole] == f"[PAD{hole}]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "without pieces"),
        (b"\n\x00", "piece '' has type 1 and score"),
        (b"\n\x03\n\x01a", "no BPE"),
        (LFS_POINTER.encode(), "is a Git-LFS pointer"),
        (b"\xff" * 40, "is not a SentencePiece model"),
    ],
)
def test_damaged_sentencepiece_model(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.model.*{message}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ["a", "a"]}, "token 'a' stands in the vocabulary twice"),
        ({"model": None}, r"brings no tokenizer; .*--tokenizer_from=FILE\.gguf"),
        ({"model": "no_vocab"}, "brings no tokenizer"),
        ({"tokens": []}, r"has no vocabulary \(tokenizer\.ggml\.tokens\)"),
        ({"merges": ["a"]}, "merge 'a' is not of two tokens to a third"),
        ({"merges": ["no such"]}, "merge 'no such' is not of two tokens to a third"),
        ({"merges": None}, "has no merges"),
        ({"pre": ["a"]}, r"tokenizer\.ggml\.pre is \['a'\], a text was expected"),
        ({"pre": "a"}, "pre-tokenizer 'a' is not supported"),
        ({"token_type": [7] * VOCABULARY}, "token_type has 7, types from 1 to 6"),
        ({"token_type": [6] * VOCABULARY}, "token_type says that .* is a byte"),
        ({"bos_token_id": VOCABULARY}, f"bos_token_id is {VOCABULARY}, a token from 0 to {VOCABULARY - 1}"),
        ({"eot_token_id": 1.5}, r"eot_token_id is 1\.5"),
        ({"add_bos_token": "no"}, "add_bos_token is 'no', true or false"),
        ({"token_type": [1]}, r"token_type does not hold a number for each of 900 tokens"),
        ({"model": "llama", "scores": ["a"] * VOCABULARY}, "scores does not hold a number for each"),
    ],
)
def test_damaged_metadata_is_named(tmp_path, change, message):
    _, fields = read(directory(tmp_path))
    with pytest.raises(ValueError, match=rf"^x\.gguf.*{message}"):
        tokenizer_from_gguf(fields | {KEY(key): value for key, value in change.items()}, Path("x.gguf"))


def test_padding_with_an_ordinary_token_leaves_texts_as_they_are(tmp_path):
    """Files name `!`, which is token 0, for padding; ids out of range mean that there is none."""
    _, fields = read(directory(tmp_path))
    ordinary = tokenizer_from_gguf(fields | {KEY("padding_token_id"): fields[KEY("tokens")].index("Ġthe")}, tmp_path)
    assert ordinary.pad_token == "Ġthe"
    none = tokenizer_from_gguf(fields | {KEY("padding_token_id"): 2**32 - 1}, tmp_path)
    assert none.pad_token is None
    assert ordinary("to the Ġthe end")["input_ids"] == none("to the Ġthe end")["input_ids"]


def test_tokenizer_by_scores_alone_says_that_it_cannot_be_saved(tmp_path):
    _, fields = read(directory(tmp_path, "Llama-2"))
    tied = tokenizer_from_gguf(fields | {KEY("scores"): [0.0] * VOCABULARY}, tmp_path)
    with pytest.raises(ValueError, match=r"scores.*cannot be saved"):
        tied.save_pretrained(tmp_path / "saved")


def test_keys_are_those_of_gguf(tmp_path):
    _, fields = read(directory(tmp_path, config={"sep_token": "<|eot_id|>", "mask_token": "<|eot_id|>"}))
    known = {value for name, value in vars(gguf.Keys.Tokenizer).items() if isinstance(value, str)}
    assert {key for key in fields if key.startswith("tokenizer.")} <= known
