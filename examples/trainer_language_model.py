"""Distils a Llama into a smaller one with the Trainer: python examples/trainer_language_model.py [FOLDER] [TEXTS].

TEXTS is a folder of .txt files; by default, descriptions of data in scikit-learn. Needs `pip install 'logitcache[hf]'`.
"""

import math
import sys
from pathlib import Path

import sklearn.datasets
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers import DataCollatorForLanguageModeling as Collator

import logitcache
from logitcache.integrations.huggingface import DistillationTrainer, text_dataset

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trainer_language_model")
pages = [getattr(sklearn.datasets, f"load_{name}")().DESCR for name in ("iris", "wine", "digits", "breast_cancer")]
if len(sys.argv) > 2:
    pages = [path.read_text() for path in sorted(Path(sys.argv[2]).rglob("*.txt"))]
texts = [line for page in pages for line in page.splitlines() if len(line) > 20]

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>"], show_progress=False))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>")
split = Dataset.from_dict({"text": texts}).train_test_split(test_size=0.1, seed=0)
train, test = (text_dataset(split[name], tokenizer, max_length=64) for name in ("train", "test"))


def llama(layers: int) -> torch.nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=train.vocab_size, pad_token_id=0, bos_token_id=None, eos_token_id=None, **sizes)
    return AutoModelForCausalLM.from_config(config)


common = {"learning_rate": 3e-3, "report_to": "none", "save_strategy": "no", "dataloader_pin_memory": False}
arguments = TrainingArguments(folder / "trainer", num_train_epochs=6, per_device_train_batch_size=16, **common)

torch.manual_seed(0)
teacher, student = llama(layers=3), llama(layers=1)
tokens = [{"input_ids": train.ids(number)} for number in range(len(train))]
Trainer(teacher, arguments, Collator(tokenizer, mlm=False), train_dataset=tokens).train()

about = {"num_samples": len(train), "num_classes": train.vocab_size, "encoding": logitcache.TopK(k=32), "teacher": "3"}
about |= {"samples": logitcache.sample_table(train, contents=True), "view_plan": logitcache.ViewPlan()}
about |= {"rows_per_sample": train.rows_per_sample, "tokenization": train.tokenization}
with logitcache.create(folder / "text.cache", **about) as writer, torch.no_grad():
    teacher.eval()
    for sample, start in enumerate(writer.row_map.offsets[:-1]):
        logits = teacher(train[sample][0]["input_ids"][None]).logits[0, :-1]  # row t predicts token t + 1
        writer.write(view=0, start=int(start), logits=logits)

cache = logitcache.open(folder / "text.cache")
trainer = DistillationTrainer(student, arguments, cache=cache, train_dataset=train, eval_dataset=test)
trainer.train()
print(f"student: perplexity {math.exp(trainer.evaluate()['eval_loss']):.1f} per token")
