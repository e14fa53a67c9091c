"""What a YAML may say (`sections`, `jobs`), and how it is read (`load`)."""

from mosaicbert.config.jobs import (
    ClassifyConfig,
    GlueConfig,
    GlueTaskConfig,
    OwnDataConfig,
    PretrainConfig,
    TrainerConfig,
)
from mosaicbert.config.load import check, dump_config, load_config
from mosaicbert.config.sections import (
    AlgorithmsConfig,
    CallbacksConfig,
    LoaderConfig,
    LoggersConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
)

__all__ = [
    "AlgorithmsConfig",
    "CallbacksConfig",
    "ClassifyConfig",
    "GlueConfig",
    "GlueTaskConfig",
    "LoaderConfig",
    "LoggersConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OwnDataConfig",
    "PretrainConfig",
    "SchedulerConfig",
    "TrainerConfig",
    "check",
    "dump_config",
    "load_config",
]
