"""vLLM gets what it is missing, and changes no version that was tested."""

from omnimri.platform.vllm_cpu import missing_requirements


def test_only_what_is_missing_and_works_here_is_installed() -> None:
    requirements = [
        "regex",
        "fastapi[standard]<0.137.0,>=0.133.0",
        "torchvision; platform_machine != 'riscv64'",
        "torch==2.13.0+cpu",
        "setuptools==78.1.1",
        "mistral_common[image]>=1.11.6",
        "model-hosting-container-standards<1.0.0,>=0.1.14",
        "numba==0.65.0",
        "six>=1.16.0; python_version < '3'",
        "pandas; extra == 'bench'",
        "Lark==1.2.2; python_version >= '3'",
    ]
    wanted = missing_requirements(requirements, installed={"regex", "fastapi"})
    assert wanted == ["model-hosting-container-standards<1.0.0,>=0.1.14", "numba==0.65.0", "Lark==1.2.2"]
