import subprocess
import sys


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, skyreels_jax; "
        "bad = {'torch', 'diffusers', 'transformers'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
