"""Every config key that ViSFT adds to detectron2's, with its documentation."""

from detectron2.config import CfgNode as CN


def add_visft_config(cfg: CN) -> None:
    """Add ViSFT's keys, with their defaults, to a detectron2 config (in place)."""
    if "VISFT" not in cfg:
        # Configs of earlier runs have this key. There is only one implementation now.
        cfg.register_deprecated_key("VISFT.COCO_METRIC")
    _add_backbone(cfg)
    _add_heads(cfg)
    _add_run(cfg)


def _add_backbone(cfg: CN) -> None:
    cfg.MODEL.CLIP_VIT = vit = CN()
    # Architecture: a name that open_clip knows (`open_clip.list_models()`), or `visft-tiny`.
    vit.NAME = "ViT-B-16"
    # Its weights: an open_clip tag, a file (.safetensors, .pt; also `visft://NAME`), the folder of a transformers
    # CLIP (a path with a separator, such as ./clip), or "" for random weights.
    vit.PRETRAINED = ""
    # `keep`: the class token stays in the sequence, as in CLIP. `drop`: patches only, the authors' dense forward.
    vit.CLASS_TOKEN = "keep"
    # Stride of the feature map in pixels; the patch embedding is resampled to it. 0: the tower's own
    # (build_clip_vit_fpn_backbone: 16, which its pyramid p2..p6 needs).
    vit.PATCH_SIZE = 0
    # Side of the attention windows in patches. 0: every block attends globally.
    vit.WINDOW_SIZE = 0
    # Indices of the blocks that attend globally when WINDOW_SIZE is set. (): every fourth, including the last.
    vit.GLOBAL_BLOCKS = ()
    # What trains under a stock detector: `none`, `lora` or `full`. A ViSFT run sets this key by its stage.
    vit.TRAIN = "none"
    # Layer-wise decay of the tower's learning rate, for LoRA or all weights: that of block i of n is multiplied by
    # this value to the power n - i (patch embedding: n + 1). 1.0: no decay.
    vit.LAYER_DECAY = 1.0
    # Recompute each block's activations in the backward pass, but for its attention. Needs less memory and about a
    # quarter more time.
    vit.ACTIVATION_CHECKPOINTING = False
    # With ACTIVATION_CHECKPOINTING: keep the inputs of recomputed blocks in the host's memory, and compute their
    # attention again, too. A GPU then keeps nothing of a recomputed block.
    vit.OFFLOAD_ACTIVATIONS = False
    # With ACTIVATION_CHECKPOINTING: GiB of activations that blocks may keep instead, on each GPU. What time recomputing
    # costs shrinks by the part of the blocks that fit. 0: all blocks are recomputed.
    vit.MEMORY_BUDGET_GIB = 0.0
    # Type in which the blocks' frozen weight matrices are stored and used: `float16` or `bfloat16`. `auto`: the type
    # of AMP, if all stages have the same. `int8`: stored with a scale for each output channel (by torchao), and used in
    # the type of the activations. "": unchanged.
    vit.FROZEN_DTYPE = ""
    # Channels of the pyramid's levels (build_clip_vit_fpn_backbone).
    vit.FPN_CHANNELS = 256

    cfg.MODEL.LORA = lora = CN()
    lora.RANK = 64
    # The update is (ALPHA / RANK) B A.
    lora.ALPHA = 1.0
    # Dropout on the adapter's input, in training.
    lora.DROPOUT = 0.0
    # Projections of each block that get an adapter: any of q, k, v, proj, fc1, fc2 (the MLP; fc1 includes SwiGLU's
    # gate).
    lora.TARGETS = ("q", "v")
    # Adapters only in the last n blocks. 0: in all.
    lora.LAST_BLOCKS = 0


def _add_heads(cfg: CN) -> None:
    cfg.MODEL.VISFT = visft = CN()
    # The heads, by the names of their config nodes below (lower case). Losses and reports have the same order.
    visft.HEADS = ("detection", "segmentation")
    # A factor on all losses of a head, in the order of HEADS. (): 1 for each.
    visft.LOSS_WEIGHTS = ()
    # Stage `lora`: for each batch, scale the gradients from the heads to the shared features to one norm, their mean.
    # This key has no effect in stage `heads`, where the heads share no trained weights.
    visft.BALANCE_GRADIENTS = False
    # What stage `lora` trains in the tower. `lora`: adapters, as in the paper. `full`: all weights that the feature map
    # depends on (not the projection to the CLIP embedding), without LoRA.
    visft.TUNE = "lora"
    # False: stage `lora` also trains the heads, in training mode, with the BASE_LR and WEIGHT_DECAY of
    # VISFT.SOLVER.HEADS and the schedule of stage `lora`. VISFT.STAGES ("lora",) then trains everything in one stage.
    visft.FREEZE_HEADS = True
    # Weight files (or `visft://NAME`) that the heads start from, ours or the authors'. (): new heads.
    visft.HEAD_FILES = ()

    # Losses on the tower itself in stage `lora`, beside the heads, by the names of their nodes below (lower case).
    # Without heads, set HEADS (), HEAD_FILES () and VISFT.STAGES ("lora",). Tower losses see the images that the heads
    # get; without heads, the images that they can learn from. BALANCE_GRADIENTS does not affect them.
    visft.OBJECTIVES = ()

    # 1 - cosine between the CLIP embeddings of an image by the tuned and the untuned tower.
    visft.ANCHOR = anchor = CN()
    anchor.OBJECTIVE = "Anchor"  # in VISFT_OBJECTIVES_REGISTRY
    anchor.WEIGHT = 1.0
    # Side in pixels to which both sides of the image are resized. 0: the tower's size in pretraining.
    anchor.SIZE = 0
    # Number of random parts of each image that are also anchored. 0: only whole images.
    anchor.CROPS = 0
    # Randomly make every second part grey, change its contrast, or make it a grey negative, to imitate another domain.
    anchor.RECOLOR = False

    # CLIP's own loss on images and captions. The text encoder and logit scale are the base's and frozen.
    visft.CONTRASTIVE = contrastive = CN()
    contrastive.OBJECTIVE = "Contrastive"
    contrastive.WEIGHT = 1.0
    contrastive.SIZE = 0  # like ANCHOR's

    # 1 - cosine between the mean dense feature of a region and the embedding that the untuned tower gives for the
    # cropped region (CLIPSelf).
    visft.SELF_DISTILLATION = distillation = CN()
    distillation.OBJECTIVE = "SelfDistillation"
    distillation.WEIGHT = 1.0
    # `boxes`: the annotated boxes. `grid`: m x n parts of the image, without labels.
    distillation.REGIONS = "grid"
    distillation.GRID = 6  # m and n are sampled from 1 to this
    distillation.MAX_REGIONS = 16  # regions per image, sampled if there are more; 0: all

    visft.DETECTION = det = CN()
    # Class in VISFT_HEADS_REGISTRY: DETRHead, or RCNNHead (which reads detectron2's own MODEL.RPN, MODEL.ROI_* keys).
    det.HEAD = "DETRHead"
    # Number of classes. 0: the number in the metadata of DATASETS.TRAIN[0] (`dataset_id`: its largest id + 1).
    det.NUM_CLASSES = 0
    # `contiguous`, or `dataset_id`: class outputs are the data set's own category ids (the authors' head).
    det.LABEL_SPACE = "contiguous"
    # Reinitialize the class layer if a file in HEAD_FILES has another number of classes (otherwise an error).
    det.REINIT_CLASSES = False
    det.NUM_QUERIES = 100
    det.ENCODER_LAYERS = 6
    det.ENCODER_DIM = 128
    det.DECODER_LAYERS = 6
    det.DECODER_DIM = 256
    det.NUM_ATTENTION_HEADS = 8
    det.FEEDFORWARD_DIM = 1024
    det.DROPOUT = 0.1
    det.NO_OBJECT_WEIGHT = 0.1
    # `softmax`: over the classes and no-object. `sigmoid`: a focal loss per class, divided by the number of objects
    # (Deformable DETR); NO_OBJECT_WEIGHT is not used, and inference takes the best (query, class) pairs.
    det.CLASS_LOSS = "softmax"
    # Federated loss, for data sets whose images are annotated with only some of the classes (LVIS): the number of
    # classes in an iteration's class loss: those annotated in its images, and others that are sampled. 0: all.
    det.FED_LOSS_CLASSES = 0
    # The other classes are sampled with probability proportional to their number of training images to this power.
    det.FED_LOSS_POWER = 0.5
    # Inference removes a box whose IoU with a better box of its class is above this. 1: keep all, as in DETR. After a
    # short training, several queries may still predict the same box.
    det.NMS_THRESH_TEST = 1.0
    # Loss weights, which are also the costs of the matching.
    det.CLASS_WEIGHT = 1.0
    det.L1_WEIGHT = 5.0
    det.GIOU_WEIGHT = 2.0

    visft.SEGMENTATION = seg = CN()
    seg.HEAD = "Mask2FormerHead"
    seg.NUM_CLASSES = 0
    seg.LABEL_SPACE = "contiguous"
    seg.REINIT_CLASSES = False
    seg.NUM_QUERIES = 100
    seg.ENCODER_LAYERS = 6
    seg.ENCODER_FEEDFORWARD_DIM = 512
    seg.DECODER_LAYERS = 9
    seg.DIM = 256
    seg.NUM_ATTENTION_HEADS = 8
    seg.FEEDFORWARD_DIM = 1024
    seg.NO_OBJECT_WEIGHT = 0.1
    # `softmax`: over the classes and no-object. `sigmoid`: a focal loss per class, divided by the number of objects
    # (Deformable DETR); NO_OBJECT_WEIGHT is not used, and inference takes the best (query, class) pairs.
    seg.CLASS_LOSS = "softmax"
    # Federated loss, for data sets whose images are annotated with only some of the classes (LVIS): the number of
    # classes in an iteration's class loss: those annotated in its images, and others that are sampled. 0: all.
    seg.FED_LOSS_CLASSES = 0
    # The other classes are sampled with probability proportional to their number of training images to this power.
    seg.FED_LOSS_POWER = 0.5
    seg.CLASS_WEIGHT = 2.0
    seg.MASK_WEIGHT = 5.0
    seg.DICE_WEIGHT = 5.0
    # Points at which masks are compared, and how they are sampled (PointRend).
    seg.NUM_POINTS = 12544
    seg.OVERSAMPLE_RATIO = 3.0
    seg.IMPORTANCE_RATIO = 0.75

    visft.CAPTIONING = cap = CN()
    # CaptionHead (the authors' LSTM with soft attention), or TransformerCaptionHead.
    cap.HEAD = "CaptionHead"
    # Vocabulary file from tools/build_vocabulary.py, or the authors' word map. "": the run's own (vocabulary.json in
    # its OUTPUT_DIR), which training builds from the captions of DATASETS.TRAIN.
    cap.VOCABULARY = ""
    # Reinitialize the word layers if a file in HEAD_FILES has another number of words (otherwise an error). HEAD_FILES
    # then provide no vocabulary.
    cap.REINIT_CLASSES = False
    # Minimum number of occurrences of a word in these captions for the vocabulary.
    cap.MIN_WORD_COUNT = 5
    # Maximum number of words of a caption. Training truncates longer captions.
    cap.MAX_LENGTH = 30
    # Beam size of inference. 1: the most probable word at each step.
    cap.BEAM_SIZE = 3
    # The feature map is averaged to GRID x GRID cells.
    cap.GRID = 14
    # Width of the word embeddings (TransformerCaptionHead: of everything but its MLPs).
    cap.EMBEDDING_DIM = 384
    # Dropout before the word scores (TransformerCaptionHead: in every layer, where 0.1 is usual).
    cap.DROPOUT = 0.5
    # CaptionHead only: width of its attention, width of its state, weight of the doubly stochastic regulariser.
    cap.ATTENTION_DIM = 384
    cap.HIDDEN_DIM = 384
    cap.ATTENTION_WEIGHT = 1.0
    # TransformerCaptionHead only.
    cap.NUM_LAYERS = 3
    cap.NUM_ATTENTION_HEADS = 8
    cap.FEEDFORWARD_DIM = 1024

    # The frozen text encoder as a head: compares regions with the names of their classes. It has no trainable weights.
    visft.REGION_TEXT = text = CN()
    text.HEAD = "RegionTextHead"
    text.WEIGHT = 1.0
    # `masks`: a region is its mask, or its box if it has no mask. `boxes`: a region is its box.
    text.REGIONS = "masks"
    # Prompt templates for the names. The default is the seven that OpenAI found best for photographs.
    text.PROMPTS = (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    )
    # Factor on the cosines. 0: the base's own (about 100).
    text.LOGIT_SCALE = 0.0
    # `softmax` over the names, `sigmoid` for each name, or `auto`: like the base's pretraining (SigLIP: sigmoid with
    # its bias).
    text.LOSS = "auto"
    # Like DETECTION's: names that do not take part in an iteration are not used as negatives (LVIS).
    text.FED_LOSS_CLASSES = 0
    text.FED_LOSS_POWER = 0.5

    # Inference and evaluation with any names. The text encoder names the predictions of query heads with REGION_TEXT's
    # PROMPTS and LOSS. These predictions replace the heads' own.
    visft.OPEN_VOCABULARY = names = CN()
    # A list of names, or one entry: `coco`, `lvis`, `objects365`, a .txt file with one name per line, or `test` for
    # the classes of the evaluated data set. (): off.
    names.NAMES = ()
    # The score is objectness^OBJECTNESS_POWER x probability^TEXT_POWER (FC-CLIP's for classes not trained on).
    names.OBJECTNESS_POWER = 1.0
    names.TEXT_POWER = 0.8
    # Factor on the cosines. 0: the base's own.
    names.LOGIT_SCALE = 0.0
    # Names that compete with NAMES but are not reported.
    names.OTHERS = ("background",)


def _add_run(cfg: CN) -> None:
    cfg.VISFT = run = CN()
    # Stages that tools/train_net.py runs, in this order. `heads`: the tower is frozen and the heads train. `lora`: the
    # heads are frozen and LoRA in the tower trains (MODEL.VISFT.TUNE and FREEZE_HEADS change this). A stock trainer
    # runs the first stage with SOLVER.*.
    run.STAGES = ("heads", "lora")
    # Whether to evaluate a stage before the next one starts. The last stage is always evaluated. So is the first, if
    # nothing was evaluated before it.
    run.EVAL_BETWEEN_STAGES = True
    # `joint`: the images of an iteration pass the tower once and feed every head that they have labels for. `ratio`,
    # the authors' mode: an iteration samples one task, takes images with its labels, and feeds only its head.
    run.TASK_MIXING = "joint"
    # With `ratio`: relative frequencies of the tasks, in the order of MODEL.VISFT.HEADS. (): equal.
    run.TASK_RATIOS = ()
    # With `ratio`: a task's own values, by its head. A head without a node here uses the common values.
    run.TASKS = CN({"DETECTION": task(), "SEGMENTATION": task(), "CAPTIONING": task()})
    # Metrics of captions: any of BLEU, ROUGE_L, CIDEr (all without Java), METEOR, SPICE (Java programs; SPICE also
    # needs Stanford CoreNLP 3.6.0 in pycocoevalcap's spice/lib).
    run.CAPTION_METRICS = ("BLEU", "ROUGE_L", "CIDEr")
    # Minutes that processes wait for one another before they fail. Must exceed the time that one of them takes to
    # compute metrics or to save.
    run.PROCESS_TIMEOUT = 60.0
    # Formats written to OUTPUT_DIR/export after the last stage: any of open_clip, timm, hf, onnx, safetensors, lora,
    # authors, peft. (): none.
    run.EXPORT = ("open_clip",)

    # Your own data in COCO format, without code. If set, these keys replace DATASETS.TRAIN / DATASETS.TEST.
    run.DATA = data = CN()
    data.TRAIN_JSON = ""
    data.TRAIN_IMAGES = ""
    data.TEST_JSON = ""
    data.TEST_IMAGES = ""
    # Captions of these images, in the format of COCO's captions_*.json. "": none. Captions and IMAGES without JSON
    # make a data set with only captions.
    data.TRAIN_CAPTIONS = ""
    data.TEST_CAPTIONS = ""
    # Captioned images in tar files (WebDataset: KEY.jpg with KEY.txt or KEY.json): a folder, a pattern (`*.tar`), or a
    # range (`{000000..000099}.tar`). Together with TRAIN_JSON, both are training data. "": none.
    data.TRAIN_SHARDS = ""
    # Images with more pixels are refused in every data set, because a small file can fill the memory. 0: no limit.
    data.MAX_PIXELS = 178_956_970

    # tools/train_net.py reads MIN_SIZE_*, MAX_SIZE_* and RANDOM_FLIP of detectron2's INPUT for ViSFT runs; FORMAT must
    # be RGB. Only detectron2's stock mapper uses MASK_FORMAT and CROP; ours reads both polygons and bitmaps.
    # How training images are resized: `detection` (short side INPUT.MIN_SIZE_TRAIN, half the time after a random crop,
    # as in DETR), `lsj` (large-scale jitter to SIZE, as in Mask2Former), `fixed` (long side SIZE, no crop), `square`
    # (both sides SIZE).
    run.INPUT = inp = CN()
    inp.AUGMENTATION = "detection"
    inp.SIZE = 1024
    inp.JITTER_SCALE = (0.1, 2.0)
    inp.CROP_RESIZE = (400, 500, 600)
    inp.CROP_SIZE = (384, 600)
    inp.CROP_PROBABILITY = 0.5

    # Memory in GiB per process for caching the frozen tower's features in stage `heads`. An image that repeats
    # unchanged (`fixed`, `square`) is computed only once. Each image then passes the tower by itself. 0: off.
    run.FEATURE_CACHE = 0.0

    # How several processes share the model. `DDP`: each has all of it. `FSDP2`: each has a piece of every block of the
    # tower, which is gathered while the block computes, and all of the rest.
    run.STRATEGY = "DDP"

    # `blocks`: training compiles the tower's blocks and the heads' layers with torch.compile, which needs a C++
    # compiler. "": off.
    run.COMPILE = ""

    run.SOLVER = CN()
    run.SOLVER.HEADS = _solver(base_lr=5e-5, max_iter=150000)
    run.SOLVER.LORA = _solver(base_lr=1e-5, max_iter=100000)

    # Leave out images that are missing, broken, too large or of another size than annotated, and report their number,
    # instead of stopping at the first.
    cfg.DATALOADER.SKIP_BROKEN = False


def task() -> CN:
    """Keys of a task (`VISFT.TASKS.<HEAD>`). 0, "" and () stand for the common value, named in brackets."""
    node = CN()
    node.IMS_PER_BATCH = 0  # over all processes, in both stages (VISFT.SOLVER.<STAGE>.IMS_PER_BATCH)
    node.AUGMENTATION = ""  # (VISFT.INPUT.AUGMENTATION)
    node.SIZE = 0  # for all augmentations but `detection` (VISFT.INPUT.SIZE)
    node.MIN_SIZE_TRAIN = ()  # for `detection` (INPUT.MIN_SIZE_TRAIN)
    node.MAX_SIZE_TRAIN = 0  # for `detection` (INPUT.MAX_SIZE_TRAIN)
    return node


def _solver(base_lr: float, max_iter: int) -> CN:
    solver = CN()
    solver.IMS_PER_BATCH = 8  # over all processes
    solver.BASE_LR = base_lr
    solver.WEIGHT_DECAY = 1e-4
    solver.MAX_ITER = max_iter
    solver.WARMUP_ITERS = 2000  # linear, then cosine to 0 at MAX_ITER
    solver.CLIP_NORM = 0.1  # maximum L2 norm of the gradient over all trained weights; 0: no clipping
    solver.ACCUMULATE = 1  # batches per step; gradients are averaged over them
    solver.CHECKPOINT_PERIOD = 5000
    solver.KEEP_CHECKPOINTS = 2  # number of latest checkpoints to keep; 0: all, for example for a curve
    solver.EVAL_PERIOD = 0  # evaluates after saving a checkpoint; 0: only after the stage's last iteration
    # "" (float32), "bfloat16" (CPU and CUDA), "float16" (CUDA, with loss scaling), or "auto": bfloat16 on a GPU that
    # supports it, else float32. Evaluation and prediction use the last stage's.
    solver.AMP = ""
    return solver
