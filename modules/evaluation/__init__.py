"""What a quantized cache costs: perplexity, KL divergence and top-1 agreement along a text, drift along texts of a model's
own, and answers to questions about long contexts, caches side by side.

    ids = encode(tokenizer, load_text("prose"), 3072)
    result = measure_quality(model, ids, {"2 bits": {}, "4 bits": {"k_bits": 4, "v_bits": 4}})

or from a shell: `python -m modules.evaluation quality --model PATH --text prose`.
"""

from modules.evaluation.budget import Choice, choose
from modules.evaluation.candidates import Candidate, grid_candidates, main_candidates, parse_options, peers
from modules.evaluation.curvature import record_layers
from modules.evaluation.environment import Environment
from modules.evaluation.free import measure_free
from modules.evaluation.layers import LayerCosts, measure_layers
from modules.evaluation.passkey import measure_passkey, passkey_prompt
from modules.evaluation.quality import measure_quality
from modules.evaluation.results import (
    BenchmarkResult,
    FreeResult,
    FreeRow,
    PasskeyResult,
    PasskeyRow,
    QualityResult,
    QualityRow,
    TaskRow,
    TasksResult,
    load_result,
    save_result,
)
from modules.evaluation.streaming import greedy, prefill
from modules.evaluation.tasks import make_contexts, measure_tasks
from modules.evaluation.texts import encode, load_text

__all__ = [
    "BenchmarkResult",
    "Candidate",
    "Choice",
    "Environment",
    "FreeResult",
    "FreeRow",
    "LayerCosts",
    "PasskeyResult",
    "PasskeyRow",
    "QualityResult",
    "QualityRow",
    "TaskRow",
    "TasksResult",
    "choose",
    "encode",
    "greedy",
    "grid_candidates",
    "load_result",
    "load_text",
    "main_candidates",
    "make_contexts",
    "measure_free",
    "measure_layers",
    "measure_passkey",
    "measure_quality",
    "measure_tasks",
    "parse_options",
    "passkey_prompt",
    "peers",
    "prefill",
    "record_layers",
    "save_result",
]
