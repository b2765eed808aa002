"""Tokenizers and models from folders and GGUF files that are written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitcache
from logitcache.catalog.calling import model_logits
from logitcache.catalog.datasets import load_data
from logitcache.catalog.language_models import transformers_model
from logitcache.catalog.models import fingerprint_args
from logitcache.catalog.tokenization import gguf_digest, load_tokenizer
from logitcache.data.batching import pad
from logitcache.data.rows import rows_of_dataset
from logitcache.data.samples import sample_table
from logitcache.data.views import ViewPlan
from logitcache.errors import IdentityMismatch, UsageError
from logitcache.verify.fit import open_fitting_cache
from tests.needs import need_package
from tests.texts import BYTE_TOKENS, BYTE_VOCABULARY, byte_tokenizer

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
VOCABULARY = BYTE_VOCABULARY + 1
"""Of the GGUF files, whose tokenizer has one merge."""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(autouse=True)
def _packages() -> None:
    need_package("transformers", "hf")
    need_package("gguf", "hf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The byte tokenizer as `transformers` saves it, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    saved = PreTrainedTokenizerFast(
        tokenizer_file=str(byte_tokenizer(tmp_path / "bytes.json")), mask_token="<mask>", pad_token="<pad>"
    )
    saved.chat_template = TEMPLATE
    saved.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def text_of(dataset: Any, index: int) -> str:
    return bytes(_byte(token) for token in dataset.ids(index)).decode()


def _byte(token: int) -> int:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    return int(byte_of[sorted(ByteLevel.alphabet())[token - len(BYTE_TOKENS)]])


def test_a_folder_and_a_file_of_one_tokenizer_give_the_same_ids(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n")

    one, other = (
        load_data("text", root=tmp_path / "a.txt", args={"tokenizer": str(place)}).train
        for place in (folder, tmp_path / "bytes.json")
    )

    assert "some text" == text_of(one, 0)
    assert one.ids(0).tolist() == other.ids(0).tolist()  # type: ignore[attr-defined]
    assert ((0, 1, 2, 3), 3, BYTE_VOCABULARY) == (one.special_ids, one.mask_id, one.vocab_size)  # type: ignore[attr-defined]


def test_chats_are_rendered_by_the_template_which_is_part_of_the_identity(folder: Path, tmp_path: Path) -> None:
    entries = [{"text": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Ho"}]}, {"text": "Hm"}]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE.replace("}}]", "}}>"))

    own, changed = (
        load_data("text", root=tmp_path / "a.jsonl", args={"tokenizer": str(folder), "chat_template": template}).train
        for template in (True, str(other))
    )

    assert ["[user]Hi[bot]Ho", "[user]Hm"] == [text_of(own, 0), text_of(own, 1)]
    assert own.tokenization["chat_template"] != changed.tokenization["chat_template"]  # type: ignore[attr-defined]
    assert own.tokenization["special_tokens"] is False  # type: ignore[attr-defined]
    other.write_text("{{ nonsense(")
    with pytest.raises(UsageError, match=r"the chat template fails on a.jsonl:1"):
        load_data("text", root=tmp_path / "a.jsonl", args={"tokenizer": str(folder), "chat_template": str(other)})


def test_a_cache_of_another_chat_template_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in ("Hi", "Hm", "Ho")))
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE + "{# the same text #}")
    own, changed = (
        load_data("text", root=tmp_path / "a.jsonl", args={"tokenizer": str(folder), "chat_template": template})
        for template in (True, str(other))
    )
    plan, rows = ViewPlan(rows=rows_of_dataset(own.train)), rows_of_dataset(own.train)
    with logitcache.create(
        tmp_path / "a.cache",
        num_samples=3,
        num_classes=own.num_classes,
        teacher="model",
        samples=sample_table(own.train, contents=True),
        view_plan=plan,
        rows_per_sample=np.diff(rows.offsets),
        tokenization=own.train.tokenization,  # type: ignore[attr-defined]
    ) as writer:
        writer.write(view=0, start=0, logits=torch.zeros(rows.num_rows, own.num_classes))

    open_fitting_cache(str(tmp_path / "a.cache"), own, plan, None, num_views=1, trust=False)
    with pytest.raises(IdentityMismatch, match="tokenization.chat_template"):
        open_fitting_cache(str(tmp_path / "a.cache"), changed, plan, None, num_views=1, trust=False)


def written_gguf(path: Path, model: Any, *, name: str = "tiny", tokens: list[str] | None = None) -> Path:
    """A Llama with the byte tokenizer as a GGUF file."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    writer = GGUFWriter(str(path), "llama")
    writer.add_name(name)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens or [*BYTE_TOKENS, *sorted(ByteLevel.alphabet()), "ab"])
    writer.add_token_types([3] * len(BYTE_TOKENS) + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    layer = "model.layers.0."
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        f"{layer}input_layernorm.weight": "blk.0.attn_norm.weight",
        f"{layer}post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        f"{layer}self_attn.q_proj.weight": "blk.0.attn_q.weight",
        f"{layer}self_attn.k_proj.weight": "blk.0.attn_k.weight",
        f"{layer}self_attn.v_proj.weight": "blk.0.attn_v.weight",
        f"{layer}self_attn.o_proj.weight": "blk.0.attn_output.weight",
        f"{layer}mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        f"{layer}mlp.up_proj.weight": "blk.0.ffn_up.weight",
        f"{layer}mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    for key, tensor in names.items():
        values = state[key]
        if "q_proj" in key or "k_proj" in key:  # GGUF interleaves the halves of rotary embeddings
            values = values.reshape(2, 2, 8, 32).swapaxes(1, 2).reshape(32, 32)
        writer.add_tensor(tensor, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return transformers_model(VOCABULARY, task="causal", config=LLAMA).eval()


def test_a_gguf_file_has_a_tokenizer_and_a_model(model: Any, tmp_path: Path) -> None:
    path = written_gguf(tmp_path / "tiny.gguf", model)
    (tmp_path / "a.txt").write_text("some text\n")

    # transformers adds <unk>, which this model has not
    data = load_data("text", root=tmp_path / "a.txt", args={"tokenizer": str(path), "vocab_size": VOCABULARY})
    loaded = transformers_model(data.num_classes, data.train.tokenization, path=str(path)).eval()  # type: ignore[attr-defined]

    inputs = pad([data.train[0][0]])
    with torch.no_grad():
        torch.testing.assert_close(model_logits(loaded, inputs), model_logits(model, inputs))


def test_the_digest_of_a_gguf_tokenizer_covers_its_tokens_and_nothing_else(model: Any, tmp_path: Path) -> None:
    one = written_gguf(tmp_path / "one.gguf", model)
    renamed = written_gguf(tmp_path / "renamed.gguf", model, name="another")
    tokens = [*BYTE_TOKENS, *[f"t{number}" for number in range(256)], "ab"]
    retokenized = written_gguf(tmp_path / "tokens.gguf", model, tokens=tokens)

    digests = [load_tokenizer(path).sha256 for path in (one, renamed)]

    assert digests[0] == digests[1]
    assert fingerprint_args("transformers", {"path": str(one)}) != fingerprint_args(
        "transformers", {"path": str(renamed)}
    )
    assert gguf_digest(one, "tokenizer.") != gguf_digest(retokenized, "tokenizer.")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no such thing" * 10)

    with pytest.raises(UsageError, match=r"can't be loaded: .*broken.gguf"):
        load_tokenizer(tmp_path / "broken.gguf")
