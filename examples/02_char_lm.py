"""Train a character-level language model with the library's own parts, and let it write.

    python examples/02_char_lm.py [STEPS]

The text is the source of Python's standard library; open_corpus reads any file or folder.
"""

import math
import sys

import minitv
from autograd import Random, cross_entropy, no_grad
from autograd.cpu.process import blas_threads
from minitv.corpus import open_corpus
from minitv.data import Batches, windows
from minitv.optim import AdamW, cosine
from minitv.sample import generate

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
context = 64
corpus = open_corpus(context=context)
tokenizer = corpus.tokenizer

model = minitv.build("transformer", vocab=tokenizer.vocab, context=context, layers=2, width=128, heads=4)
optimizer = AdamW(model, weight_decay=0.1, clip=1.0)
batches = Batches(corpus.training, batch=16, context=context, seed=1)

with blas_threads(1):  # these products are too small to share between cores
    for step in range(steps):
        inputs, labels = batches.batch(step)  # [B T] token ids, and those that follow them
        loss = cross_entropy(model(inputs), labels)  # the mean, in nats
        loss.backward(sink=optimizer.buffers[0])  # leaf gradients go straight into the optimizer's flat buffer
        norm = optimizer.step(cosine(step, lr=3e-3, min_lr=3e-4, warmup=50, steps=steps))
        if step % 50 == 0 or step == steps - 1:
            bits = loss.item() / math.log(2)
            print(f"step {step + 1:4}  loss {loss.item():.3f} nats  {bits:.3f} bits  gradient {norm:.2f}")

with no_grad():
    inputs, labels = windows(corpus.held_out, context, 20_000)
    bits = cross_entropy(model(inputs), labels).item() / math.log(2)
print(f"held out: {bits:.3f} bits per character")
for order, baseline in enumerate(corpus.baselines[:4]):
    print(f"  n-gram of order {order}: {baseline:.3f}")

prompt = tokenizer.encode("    def ")
tokens = generate(model, prompt, 300, Random(2), temperature=0.8)
print("    def " + tokenizer.decode(list(tokens)))
