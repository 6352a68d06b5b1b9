"""What a report says besides its findings: how to read it, how to repeat it, and its limits."""

from typing import Any

from train.readable import listed, readable_count, three_digits
from train.report.outcomes import is_softmax, num_seeds
from train.report.paths import portable, without_folders
from train.report.tables import INSIDE

SHORTENED = "Full paths in this command were cut to their last part."
SAME_NUMBERS = (
    "The same machine and versions give the same losses again, bit for bit; times will differ."
)


def title(results: dict[str, Any]) -> str:
    """The mixers and the text."""
    mixers = listed([model["mixer"] for model in results["models"]])
    return f"{mixers} on {without_folders(results['data']['name'])}"


def reading_notes(results: dict[str, Any]) -> str:
    """Below the results table."""
    models = results["models"]
    several = num_seeds(models) > 1
    margin = "; ± is half the 95 % interval of the mean over seeds" if several else ""
    text = (
        "Loss is in nats per token, on text that was not trained on; perplexity is its exponential"
        f"{margin}. Training tokens/s is the median of measurements that take turns between "
        "the mixers. 1 KB is 1,000 bytes."
    )
    if any(model.get("flops_per_token") for model in models):
        text += " FLOPs/token are those of training, forward and backward."
    return text


def table_note(name: str, results: dict[str, Any]) -> str:
    """What must be known to read one of the other tables; empty where it speaks for itself."""
    models = results["models"]
    if name == "Generation":
        return _state_note(models)
    if name == "Longer contexts":
        return (
            "Loss in nats per token of the last tokens of the longest windows, one training "
            "context of them, read with more and more text before them; first seed of each mixer."
        )
    if name == INSIDE:
        return (
            "As the instruments read it on a small piece of the validation text at the end of "
            "training: means over layers and seeds, unless it says largest or smallest. The "
            "attention of a model without one is the matrix of its parallel form."
        )
    if name == "Learning rates tried":
        return (
            "The same number for every mixer. They were judged on the validation text, which "
            "flatters all mixers alike."
        )
    if name.startswith("Task: "):
        return _task_note(name.removeprefix("Task: "), models)
    return ""


def recipe(results: dict[str, Any]) -> tuple[str, str, list[tuple[str, str]]]:
    """The command, a note on it, and the settings."""
    settings, data, machine = (results[key] for key in ("settings", "data", "machine"))
    command, shortened = portable(settings["command"])
    in_tasks = ", in tasks fp32" if settings.get("tasks") else ""
    rows = [
        ("size", str(settings["size"])),
        (
            "steps, batch size, context",
            f"{settings['steps']:,}, {settings['batch_size']:,}, {settings['context']:,}",
        ),
        ("seeds", ", ".join(str(seed) for seed in settings["seeds"])),
        ("data", without_folders(data["name"])),
        ("tokenizer", f"{without_folders(data['tokenizer'])}, {data['vocab_size']:,} tokens"),
        ("training, validation tokens", f"{data['train_tokens']:,}, {data['validation_tokens']:,}"),
        ("ebb, torch", f"{machine['ebb']}, {machine['torch']}"),
        ("processor", f"{machine['processor']}, {machine['threads']} threads"),
        ("products in training", machine.get("precision", "fp32") + in_tasks),
    ]
    optional = (("budget", "budget"), ("tune", "learning rates tried"))
    rows[1:1] = [(name, str(settings[key])) for key, name in optional if settings.get(key)]
    return command, f"{SHORTENED} {SAME_NUMBERS}" if shortened else SAME_NUMBERS, rows


def limits(results: dict[str, Any]) -> str:
    """What the numbers do not say."""
    models, machine = results["models"], results["machine"]
    parameters = max(model["parameters"] for model in models)
    tokens = max(run["tokens"] for model in models for run in model["runs"])
    tuned = any(model.get("tuning") for model in models)
    found = [
        f"These are small models (at most {readable_count(parameters)} parameters) after a short "
        f"training ({readable_count(tokens)} tokens, {three_digits(tokens / parameters)} for each "
        "parameter, where large models see 20 and more): an order found here may not hold for "
        "larger models or longer training.",
        "Of each mixer's recipe only the learning rate was tuned on this text."
        if tuned
        else "Each mixer has one recipe, fixed beforehand; none was tuned on this text.",
        f"Speeds are of this implementation on one machine with {machine['threads']} threads; "
        "another machine can order the mixers differently.",
        f"The text is {without_folders(results['data']['name'])} alone, and the samples are one "
        "draw each.",
    ]
    seeds = num_seeds(models)
    if seeds == 1:
        found.append("With one seed, chance cannot be told from a small difference.")
    elif seeds < 5:
        found.append(f"{seeds} seeds give only a rough idea of the noise.")
    return " ".join(found)


def _task_note(task: str, models: list[dict[str, Any]]) -> str:
    """How to read the accuracies, and what the models that were asked are like."""
    parts = []
    if num_seeds(models) > 1:
        parts.append("Accuracy; ± is half the 95 % interval of the mean over seeds.")
    described = [
        f"{model['mixer']} {one['parameters']:,} and {one['state_bytes']:,}"
        + (f" at width {one['width']}" if len(of_task) > 1 else "")
        for model in models
        for of_task in [(model.get("task_models") or {}).get(task, [])]
        for one in of_task
    ]
    if described:
        parts.append(
            f"Parameters, and bytes of state at the end of the longest text: {listed(described)}."
        )
    return " ".join(parts)


def _state_note(models: list[dict[str, Any]]) -> str:
    softmax = [model["mixer"] for model in models if is_softmax(model["mixer"])]
    text = "Milliseconds are medians, beside the middle half of the measurements."
    if softmax:
        text += (
            f" The softmax baseline ({listed(softmax)}) keeps the key and the value of every token "
            "it has read: its cache grows with the context, and so does the work for each token. "
            "A new token is written into room kept behind the cache, which is doubled where it is "
            "full; sizes are those of what is in use."
        )
    return text
