"""Which of PEFT's tests are run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """The tests of ``file`` whose names hold every word of ``needs`` and none of ``without``, as with pytest's -k.

    A test counts to the first selection that it fits.
    """

    name: str
    file: str
    needs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


CUSTOM = "test_custom_models.py"
STARTS = "test_initialization.py"

SELECTIONS = (
    Selection("custom models, MLPs", CUSTOM, ("TestPeftCustomModel", "LoraConfig", "MLP"), ("Fsdp", "Embedding")),
    Selection("layer names", CUSTOM, ("TestLayerRepr",)),
    Selection("several active adapters", CUSTOM, ("TestMultipleActiveAdapters", "Lora")),
    Selection("mixed batches", CUSTOM, ("TestMixedAdapterBatches",)),
    Selection("requires_grad", CUSTOM, ("TestRequiresGrad",)),
    Selection("dynamic dispatch", CUSTOM, ("TestDynamicDispatch",)),
    Selection("default targets", CUSTOM, ("TestDefaultTargetModules",)),
    Selection("variants", "test_lora_variants.py"),
    Selection("initialisation", STARTS, ("TestLoraInitialization",)),
    Selection("hotswap", STARTS, ("TestHotSwapping",)),
    Selection("CorDA", STARTS, ("TestCordaInitialization",)),
    Selection("EVA", STARTS, ("TestEvaInitialization",)),
    Selection("weight tying", STARTS, ("TestWeightTying",)),
    Selection("other of initialisation", STARTS),
    Selection("LoRA-GA", "test_lora_ga.py"),
    Selection("LoRA-FA", "test_lorafa.py"),
    Selection("LoRA+", "test_loraplus.py"),
    Selection("conversion to LoRA", "test_lora_conversion.py"),
    Selection("intruder dimensions", "test_lora_intruders.py"),
    Selection("mixed methods", "test_mixed.py"),
    Selection("tuner utilities", "test_tuners_utils.py"),
    Selection("low-level API", "test_low_level_api.py"),
    Selection("helpers", "test_helpers.py"),
    Selection("hub features", "test_hub_features.py"),
    Selection("other", "test_other.py"),
)
