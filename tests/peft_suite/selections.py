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
    required: bool = False  # every version has such tests, and to find none is a failure


CUSTOM = "test_custom_models.py"
STARTS = "test_initialization.py"

SELECTIONS = (
    Selection(
        "custom models, MLPs",
        CUSTOM,
        ("TestPeftCustomModel", "LoraConfig", "MLP"),
        ("Fsdp", "Embedding"),
        required=True,
    ),
    Selection("layer names", CUSTOM, ("TestLayerRepr",), required=True),
    Selection("several active adapters", CUSTOM, ("TestMultipleActiveAdapters", "Lora"), required=True),
    Selection("mixed batches", CUSTOM, ("TestMixedAdapterBatches",), required=True),
    Selection("requires_grad", CUSTOM, ("TestRequiresGrad",), required=True),
    Selection("dynamic dispatch", CUSTOM, ("TestDynamicDispatch",), required=True),
    Selection("default targets", CUSTOM, ("TestDefaultTargetModules",)),
    Selection("variants", "test_lora_variants.py", required=True),
    Selection("initialisation", STARTS, ("TestLoraInitialization",), required=True),
    Selection("hotswap", STARTS, ("TestHotSwapping",), required=True),
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
