"""Static INT8 caches: a model is calibrated once, by a YAML spec, and every cache takes the parameters.

    parameters = calibrate(model, "spec.yaml", batches)
    parameters.save("int8.safetensors")
    with deploy(model, parameters):  # fake quantization: what the codes cost, in any cache
        model.generate(**inputs)

or from a shell: `python -m modules.calibration MODEL --spec spec.yaml --out int8.safetensors`.
"""

from modules.calibration.calibrate import calibrate
from modules.calibration.deployment import FakeQuantizedCache, deploy
from modules.calibration.quantizers import DynamicCacheQuantizer, FakeQuantDynamicCache
from modules.calibration.spec import DynamicCacheProcess, QuantizationConfig, Spec, load_spec
from modules.codecs.static import ChannelScales, StaticParameters

__all__ = [
    "ChannelScales",
    "DynamicCacheProcess",
    "DynamicCacheQuantizer",
    "FakeQuantDynamicCache",
    "FakeQuantizedCache",
    "QuantizationConfig",
    "Spec",
    "StaticParameters",
    "calibrate",
    "deploy",
    "load_spec",
]
