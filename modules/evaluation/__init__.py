"""What a quantized cache costs: perplexity, KL divergence, top-1 agreement and passkey retrieval, caches side by side.

    ids = encode(tokenizer, load_text("prose"), 3072)
    result = measure_quality(model, ids, {"2 bits": {}, "4 bits": {"k_bits": 4, "v_bits": 4}})

or from a shell: `python -m modules.evaluation quality --model PATH --text prose`.
"""

from modules.evaluation.candidates import Candidate, grid_candidates, main_candidates, parse_options, peers
from modules.evaluation.environment import Environment
from modules.evaluation.layers import LayerCosts, choose_bits, measure_layers
from modules.evaluation.passkey import measure_passkey, passkey_prompt
from modules.evaluation.quality import measure_quality
from modules.evaluation.results import (
    BenchmarkResult,
    PasskeyResult,
    PasskeyRow,
    QualityResult,
    QualityRow,
    load_result,
    save_result,
)
from modules.evaluation.streaming import greedy, prefill
from modules.evaluation.texts import encode, load_text

__all__ = [
    "BenchmarkResult",
    "Candidate",
    "Environment",
    "LayerCosts",
    "PasskeyResult",
    "PasskeyRow",
    "QualityResult",
    "QualityRow",
    "choose_bits",
    "encode",
    "greedy",
    "grid_candidates",
    "load_result",
    "load_text",
    "main_candidates",
    "measure_layers",
    "measure_passkey",
    "measure_quality",
    "parse_options",
    "passkey_prompt",
    "peers",
    "prefill",
    "save_result",
]
