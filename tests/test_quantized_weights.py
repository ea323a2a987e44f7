"""Checkpoints with quantized weights: transformers' `quantization_config` reaches the KIVI classes as any other."""

import pytest
import torch
from conftest import FAMILIES, SMALL, make_pair, relative_error, tokens
from transformers import AwqConfig, BitsAndBytesConfig, CompressedTensorsConfig, GPTQConfig, TorchAoConfig

NO_TORCHAO = "torchao is not installed (`pip install torchao`): transformers loads it, noisily, in every process"
CONFIGS = {
    "bitsandbytes": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "gptq": lambda: GPTQConfig(bits=4),
    "awq": lambda: AwqConfig(bits=4),
    "compressed-tensors": lambda: CompressedTensorsConfig(format="pack-quantized"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_keeps_its_weights_quantization_beside_the_caches(name, tmp_path):
    """Built, saved and loaded; their kernels need a GPU, and are not run here."""
    _, _, config_class, kivi_class, extra = FAMILIES["llama"]
    quantization = CONFIGS[name]()
    config = config_class(**extra, k_bits=4, v_bits=2, quantization_config=quantization.to_dict())
    config.save_pretrained(tmp_path)
    loaded = config_class.from_pretrained(tmp_path)
    assert loaded.quantization_config["quant_method"] == quantization.quant_method.value
    assert (loaded.k_bits, loaded.v_bits) == (4, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights_of_torchao_run_over_a_packed_cache(family, tmp_path):
    """Near the model they were made from; at 16 bits a step over the cache gives what a forward without one gives."""
    quantization = pytest.importorskip("torchao.quantization", reason=NO_TORCHAO)
    stock, _ = make_pair(family)
    stock.save_pretrained(tmp_path)
    kivi_class = FAMILIES[family][3]
    quantized = kivi_class.from_pretrained(
        tmp_path,
        **SMALL,
        k_bits=16,
        v_bits=16,
        backend="torch",
        dtype=torch.float32,
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    ).eval()
    ids = tokens(2, 90)
    with torch.no_grad():
        cache = quantized.create_kivi_cache()
        quantized(ids[:, :80], past_key_values=cache)
        stepped = quantized(ids[:, 80:], past_key_values=cache).logits
        whole, unquantized = quantized(ids).logits[:, 80:], stock(ids).logits[:, 80:]
    assert relative_error(stepped, whole) < 1e-5
    assert 1e-5 < relative_error(whole, unquantized) < 0.05
    packed = quantized.create_kivi_cache(k_bits=2, v_bits=2)
    out = quantized.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=packed, max_new_tokens=4)
    assert out.shape == (2, 94) and packed.get_cache_info()["tokens"]["packed"] > 0
