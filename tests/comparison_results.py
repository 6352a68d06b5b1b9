"""Made-up results of `ebb compare`, in its format: what each mixer scored is up to the caller."""

import math
import random

CONTEXTS = (128, 512, 2048, 4096, 16384)
KV_BYTES = 2048


def curves(final, speed, seed, steps=500):
    noise = random.Random(seed)
    losses = [
        {"tokens": step * 2048, "seconds": step * 2048 / speed, "loss": loss}
        for step in range(10, steps + 1, 10)
        for loss in [final + 4.2 * math.exp(-step / 60) + noise.gauss(0, 0.08)]
    ]
    validation = []
    for step in range(100, steps + 1, 100):
        loss = final + 4.2 * math.exp(-step / 60) - 4.2 * math.exp(-steps / 60)
        at = {"tokens": step * 2048, "seconds": step * 2048 / speed}
        validation.append(at | {"loss": loss, "bits_per_byte": loss / 2.9})
    return losses, validation


def model(mixer, bits, speed, times, state_bytes):
    runs = []
    for seed, value in enumerate(bits):
        losses, validation = curves(value * 2.9, speed, seed)
        runs.append(
            {
                "seed": seed,
                "folder": f"runs/{mixer}-{seed}",
                "validation_loss": value * 2.9,
                "validation_bits_per_byte": value,
                "tokens": 1_024_000,
                "seconds": 1_024_000 / speed,
                "tokens_per_second": float(speed),
                "curve": losses,
                "validation_curve": validation,
            }
        )
    return {
        "mixer": mixer,
        "parameters": 1_312_000,
        "ffn_dim": 512,
        "weight_bytes": 5_248_000,
        "runs": runs,
        "training_speed": {"tokens_per_second": speed, "low": 0.97 * speed, "high": 1.03 * speed},
        "generation": [
            {"context": c, "ms_per_token": t, "low": 0.95 * t, "high": 1.08 * t, "state_bytes": b}
            for c, t, b in zip(CONTEXTS, times, state_bytes, strict=True)
        ],
        "sample": {"prompt": "Fellow citizens,", "text": "of the Senate\nand *the* House <of>"},
    }


def rwkv7(*bits, speed=5000, times=(0.52, 0.53, 0.51, 0.52, 0.52)):
    return model("rwkv7", bits, speed, times, [270_336] * len(CONTEXTS))


def attention(*bits, speed=9500, times=(0.4, 0.45, 0.71, 1.1, 2.65)):
    return model("attention", bits, speed, times, [KV_BYTES * c for c in CONTEXTS])


def gla(*bits, speed=7000):
    return model("gla", bits, speed, (0.47, 0.47, 0.48, 0.47, 0.47), [133_000] * len(CONTEXTS))


def results(*models):
    mixers = [m["mixer"] for m in models]
    command = f"ebb compare --mixers {' '.join(mixers)} --out /home/someone/reports/first"
    return {
        "format": 1,
        "settings": {
            "mixers": mixers,
            "size": "micro",
            "data": "sotu",
            "tokenizer": "bpe",
            "context": 256,
            "batch_size": 8,
            "steps": 500,
            "seeds": list(range(len(models[0]["runs"]))),
            "command": command,
        },
        "machine": {"processor": "A CPU", "threads": 2, "torch": "2.13.0", "ebb": "0.1.0"},
        "data": {
            "name": "sotu",
            "tokenizer": "bpe",
            "vocab_size": 4096,
            "train_tokens": 2_700_000,
            "validation_tokens": 150_000,
        },
        "models": list(models),
    }
