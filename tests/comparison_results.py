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
        "machine": {
            "processor": "A CPU",
            "threads": 2,
            "precision": "bf16",
            "torch": "2.13.0",
            "ebb": "0.1.0",
        },
        "data": {
            "name": "sotu",
            "tokenizer": "bpe",
            "vocab_size": 4096,
            "train_tokens": 2_700_000,
            "validation_tokens": 150_000,
        },
        "models": list(models),
    }


def with_flops(measured, costs):
    """FLOPs, learning rates and peak memory, as newer comparisons have them."""
    measured["settings"] |= {"budget": "5min", "tune": 3}
    for number, (one, flops) in enumerate(zip(measured["models"], costs, strict=True)):
        one |= {"flops_per_token": flops, "learning_rate": 1e-3}
        one["tuning"] = [
            {"learning_rate": rate, "validation_loss": 4.2 + 0.05 * abs(math.log(rate / 1e-3))}
            for rate in (5e-4, 1e-3, 2e-3)
        ]
        for point in one["generation"]:
            point["peak_memory_bytes"] = 6_000_000 + number * point["state_bytes"]
    return measured


def diverged(one, seed=0, step=40, reason="its loss is not a finite number"):
    """A model of which one run broke off."""
    run = one["runs"][seed]
    run |= {"diverged": {"step": step, "reason": reason}, "validation_loss": None}
    run |= {"validation_bits_per_byte": None, "tokens": step * 2048}
    run["curve"] = [point for point in run["curve"] if point["tokens"] <= step * 2048]
    run["curve"].append({"tokens": step * 2048, "seconds": 9.0, "loss": None})
    run["validation_curve"] = []
    return one


def with_lengths(one, harm):
    """The loss in windows of up to 32 contexts; `harm` is added at each doubling beyond two."""
    last = [4.0 - 0.05 * min(n, 2) + harm * max(0, n - 2) for n in range(6)]
    one["lengths"] = {
        "context": 256,
        "asked": 32,
        "spans": 9,
        "lengths": [
            {
                "length": 256 * 2**n,
                "loss": loss + 0.02,
                "last": loss,
                "seen": 200.0 * 2**n,
                "gain": loss - last[0],
                "margin": 0.02,
            }
            for n, loss in enumerate(last)
        ],
        "positions": [
            {"fewest": 2**n // 2 + 1, "most": 2**n, "loss": 6 - 0.25 * min(n, 9), "tokens": 900}
            for n in range(14)
        ],
    }
    return one


def with_tasks(one, recall, parity):
    """Accuracies at points of growing difficulty, with two seeds each."""
    points = {"recall": ("num_pairs", (4, 8, 16, 32)), "parity": ("length", (16, 32, 64, 128))}
    one["tasks"] = {
        task: [
            {"point": {key: place}, "accuracy": value, "seeds": [value - 0.01, value + 0.01]}
            for place, value in zip(places, values, strict=False)
        ]
        for (task, (key, places)), values in zip(points.items(), (recall, parity), strict=True)
    }
    return one


KINDS = {
    "attention_norm": 6.0,
    "attention_entropy": 2.5,
    "attention_span": 30.0,
    "smallest_divisor": 0.002,
    "state_norm": 4.0,
    "state_rank": 5.5,
    "half_life": 25.0,
    "gradient_norm": 0.3,
}
"""What the instruments read, and about how much."""


def with_instruments(one, factor=1.0, without=(), layers=4, words=24):
    """Readings at two validations, growing with the layer and in training; and heat maps."""
    kinds = {name: factor * value for name, value in KINDS.items() if name not in without}
    for run in one["runs"]:
        whole = {
            f"{name}.layer{n}": value * (1 + n / 2)
            for name, value in kinds.items()
            for n in range(4)
        }
        along = {
            f"{name}.layer{n}.token{at}": kinds[name] * at / 256
            for name in ("state_norm", "state_rank")
            if name in kinds
            for n in range(layers)
            for at in (64, 128, 192, 256)
        }
        root = {"attention_norm.sqrt_tokens": 16.0}
        early = {"tokens": 100_000} | root | {name: v / 2 for name, v in whole.items()}
        run["instruments"] = [early, {"tokens": 1_024_000} | root | whole | along]
    rows = [[1.0 / (1 + n - m) for m in range(n + 1)] for n in range(words)]
    shares = [" ".join(f"{1000 * x / sum(row):.0f}" for x in row) for row in rows]
    title = "softmax" if one["mixer"] == "attention" else one["mixer"]
    maps = {"title": title, "words": [" word"] * words, "layers": {"0": shares, "3": shares}}
    one["attention"] = [maps]
    return one


def everything():
    """Results with all that a comparison may hold: three mixers, and one that diverged once."""
    models = [
        rwkv7(1.412, 1.418, 1.409),
        attention(1.455, 1.449, 1.46),
        gla(1.42, 1.413, 1.411),
        diverged(model("rwkv4", (1.6, 1.61, 1.62), 8000, (0.3,) * 5, [90_000] * 5), seed=1),
    ]
    accuracies = (
        ((0.97, 0.9, 0.7, 0.4), (0.99, 0.98, 0.97, 0.95)),
        ((0.99, 0.99, 0.98, 0.97), (0.9, 0.6, 0.52, 0.5)),
        ((0.9, 0.6, 0.3, 0.1), (0.98, 0.7, 0.55, 0.51)),
        ((0.5, 0.2, 0.1, 0.05), (0.97, 0.6, 0.5, 0.5)),
    )
    for one, (recall, parity), harm in zip(models, accuracies, (0, 0.4, 0, 0.02), strict=True):
        with_tasks(with_lengths(one, harm), recall, parity)
    states = ("state_norm", "state_rank", "half_life")
    with_instruments(models[0], 1.2, without=("smallest_divisor",))
    with_instruments(models[1], 0.9, without=("smallest_divisor", *states))
    with_instruments(models[2], without=("half_life",))
    return with_flops(results(*models), (8.1e6, 8.9e6, 8.4e6, 7.9e6))
