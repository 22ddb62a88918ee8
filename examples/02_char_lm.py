"""Train a character-level language model with the library's own parts, and let it write.

    python examples/02_char_lm.py [STEPS]

The text is the source of Python's standard library; open_corpus reads any file or folder.
"""

import math
import sys

from minitv.mixers.transformer import TransformerOptions

from autograd import Random, no_grad
from autograd.cpu.process import blas_threads
from minitv.corpus import open_corpus
from minitv.data import Batches, windows
from minitv.models.lm import LanguageModel
from minitv.optim import AdamW, cosine
from minitv.options import ModelOptions
from minitv.sample import generate

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
options = ModelOptions(context=64, layers=2, width=128)
corpus = open_corpus(context=options.context)
tokenizer = corpus.tokenizer

model = LanguageModel("transformer", options, TransformerOptions(heads=4), tokenizer.vocab, Random(0))
optimizer = AdamW(model, weight_decay=0.1, clip=1.0)
batches = Batches(corpus.training, batch=16, context=options.context, seed=1)

with blas_threads(1):  # these products are too small to share between cores
    for step in range(steps):
        inputs, labels = batches.batch(step)  # [B T] token ids, and those that follow them
        loss = model.loss(inputs, labels)
        loss.backward(sink=optimizer.buffers[0])  # leaf gradients go straight into the optimizer's flat buffer
        norm = optimizer.step(cosine(step, lr=3e-3, min_lr=3e-4, warmup=50, steps=steps))
        if step % 50 == 0 or step == steps - 1:
            bits = loss.item() / math.log(2)
            print(f"step {step + 1:4}  loss {loss.item():.3f} nats  {bits:.3f} bits  gradient {norm:.2f}")

with no_grad():
    bits = model.loss(*windows(corpus.held_out, options.context, 20_000)).item() / math.log(2)
print(f"held out: {bits:.3f} bits per character")
for order, baseline in enumerate(corpus.baselines[:4]):
    print(f"  n-gram of order {order}: {baseline:.3f}")

prompt = tokenizer.encode("    def ")
written = generate(model, prompt, 300, Random(2), temperature=0.8)
print("    def " + tokenizer.decode(list(written)))
