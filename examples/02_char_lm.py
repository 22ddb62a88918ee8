"""Train a character-level language model with the library's own parts, and let it write.

    python examples/02_char_lm.py [STEPS]

The text is the source of Python's standard library; any string will do.
"""

import math
import sys

from autograd import Random, cross_entropy, no_grad
from autograd.cpu.process import blas_threads
from minitv.data import Batches, load_text, split, windows
from minitv.ngram import ngram_bpc
from minitv.optim import AdamW, cosine
from minitv.sample import generate
from minitv.tokenizer import CharTokenizer
from minitv.variants import load

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
text = load_text().text
tokenizer = CharTokenizer.train(text)
experiment = load("transformer").configure(context=64, layers=2, width=128, heads=4)
training, held_out = split(tokenizer.encode(text), 64)

model = experiment.build(tokenizer.vocab)
optimizer = AdamW(model, weight_decay=0.1, clip=1.0)
batches = Batches(training, batch=16, context=64, seed=1)

with blas_threads(1):  # these products are too small to share between cores
    for step in range(steps):
        inputs, labels = batches.batch(step)  # [B T] token ids, and those that follow them
        loss = cross_entropy(model(inputs), labels)
        loss.backward(sink=optimizer.buffers[0])  # leaf gradients go straight into the optimizer's flat buffer
        norm = optimizer.step(cosine(step, lr=3e-3, min_lr=3e-4, warmup=50, steps=steps))
        if step % 50 == 0 or step == steps - 1:
            bits = loss.item() / math.log(2)
            print(f"step {step + 1:4}  loss {loss.item():.3f} nats  {bits:.3f} bits  gradient {norm:.2f}")

with no_grad():
    inputs, labels = windows(held_out, 64, 20_000)
    bits = cross_entropy(model(inputs), labels).item() / math.log(2)
print(f"held out: {bits:.3f} bits per character")
for order, baseline in enumerate(ngram_bpc(training, held_out, tokenizer.vocab)[:4]):
    print(f"  n-gram of order {order}: {baseline:.3f}")

prompt = tokenizer.encode("    def ")
written = generate(model, prompt, 300, Random(2), temperature=0.8)
print("    def " + tokenizer.decode(list(written)))
