import subprocess
import sys
from importlib.metadata import version

import pytest

import skyreels_jax


def test_importing_everything_public_imports_no_torch():
    code = (
        "import sys, skyreels_jax; "
        "[getattr(skyreels_jax, name) for name in skyreels_jax.__all__]; "
        "import skyreels_jax.cli.main as main; [main.build_parser(verb) for verb in main.VERBS]; "
        "bad = {'torch', 'diffusers', 'transformers'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names():
    assert dir(skyreels_jax) == [
        *("Checkpoint", "NumericsError", "Pipeline", "Request", "RequestError", "SkyReelsError"),
        *("TransformerConfig", "UnsupportedError", "Video", "WanModel", "WeightsError"),
    ]
    for name in skyreels_jax.__all__:
        assert getattr(skyreels_jax, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        _ = skyreels_jax.Pipelines


def test_a_module_without_arrays_is_imported_without_jax():
    code = "import sys, skyreels_jax.errors; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_known_without_jax():
    code = "import sys, skyreels_jax; print(skyreels_jax.__version__, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [version("skyreels-jax"), "False"]
