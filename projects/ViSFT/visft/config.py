"""Every config key that ViSFT adds to detectron2's. A key is documented where it is defined, and nowhere else."""

from detectron2.config import CfgNode as CN


def add_visft_config(cfg: CN) -> None:
    """Add ViSFT's keys, with their defaults, to a detectron2 config (in place)."""
    if "VISFT" not in cfg:
        # Configs of earlier runs have it. There is one implementation now, so nothing is left to choose.
        cfg.register_deprecated_key("VISFT.COCO_METRIC")
    _add_backbone(cfg)
    _add_heads(cfg)
    _add_run(cfg)


def _add_backbone(cfg: CN) -> None:
    cfg.MODEL.CLIP_VIT = vit = CN()
    # Architecture: a name that open_clip knows (`open_clip.list_models()`), or `visft-tiny`.
    vit.NAME = "ViT-B-16"
    # Its weights: an open_clip tag, a file (.safetensors, .pt; also `visft://NAME`), the folder of a CLIP of
    # transformers (a path with a separator, as ./clip), or "" for random weights.
    vit.PRETRAINED = ""
    # `keep`: the class token stays in the sequence, as in CLIP. `drop`: the authors' dense forward (patches alone).
    vit.CLASS_TOKEN = "keep"
    # Stride of the feature map in pixels; the patch embedding is resampled to it. 0: the tower's own
    # (build_clip_vit_fpn_backbone: 16, which its pyramid p2..p6 needs).
    vit.PATCH_SIZE = 0
    # Side of the attention windows in patches; 0: every block attends globally.
    vit.WINDOW_SIZE = 0
    # Indices of the blocks that attend globally although WINDOW_SIZE is set. (): every fourth, the last included.
    vit.GLOBAL_BLOCKS = ()
    # What trains under a stock detector: `none`, `lora` or `full`. A ViSFT run sets it by its stage.
    vit.TRAIN = "none"
    # Where the tower trains, its LoRA or all of it: the learning rate of block i of n is multiplied by this to the
    # power n - i (patch embedding: n + 1). 1.0: no decay.
    vit.LAYER_DECAY = 1.0
    # Recompute each block's activations in the backward pass: less memory, about a third more time.
    vit.ACTIVATION_CHECKPOINTING = False
    # Store the blocks' weight matrices, while they do not train, as `float16` or `bfloat16`, and compute with them in
    # that type; `auto`: in that of AMP, if all stages have the same; "": leave them as they are.
    vit.FROZEN_DTYPE = ""
    # Channels of the pyramid's levels (build_clip_vit_fpn_backbone).
    vit.FPN_CHANNELS = 256

    cfg.MODEL.LORA = lora = CN()
    lora.RANK = 64
    # The update is (ALPHA / RANK) B A.
    lora.ALPHA = 1.0
    # Dropout on the adapter's input, in training.
    lora.DROPOUT = 0.0
    # Which projections of each block get an adapter, of: q, k, v, proj, fc1, fc2 (the MLP; SwiGLU's gate goes
    # with fc1).
    lora.TARGETS = ("q", "v")
    # Only the last n blocks; 0: all.
    lora.LAST_BLOCKS = 0


def _add_heads(cfg: CN) -> None:
    cfg.MODEL.VISFT = visft = CN()
    # The heads, by the names of their config nodes below (lower case). The order is that of their losses and reports.
    visft.HEADS = ("detection", "segmentation")
    # A factor on all losses of a head, in the order of HEADS; (): 1 for each.
    visft.LOSS_WEIGHTS = ()
    # Stage `lora`: bring the gradients that the heads send into the shared features to one norm, their mean, at each
    # batch. Heads share nothing that trains in stage `heads`, where it changes nothing.
    visft.BALANCE_GRADIENTS = False
    # What stage `lora`, the tower's stage, trains in the tower. `lora`: its adapters (the paper's). `full`: all weights
    # that the map depends on (not the projection to the CLIP embedding); there is no LoRA then.
    visft.TUNE = "lora"
    # False: the heads train too in stage `lora`, in training mode, with the BASE_LR and WEIGHT_DECAY of
    # VISFT.SOLVER.HEADS under the stage's own schedule. With VISFT.STAGES ("lora",) that is training in one stage.
    visft.FREEZE_HEADS = True
    # Weight files (or `visft://NAME`) that the heads start from, ours or the authors'; (): fresh heads.
    visft.HEAD_FILES = ()

    # Objectives of the tower itself in stage `lora`, beside the heads, by the names of their nodes below (lower case).
    # Without heads (HEADS (), HEAD_FILES (), VISFT.STAGES ("lora",)) they are all that trains. They see the images
    # that the heads are given; without heads, those that they can learn from. BALANCE_GRADIENTS leaves them alone.
    visft.OBJECTIVES = ()

    # 1 - cosine between the CLIP embedding of an image and that of the tower before tuning.
    visft.ANCHOR = anchor = CN()
    anchor.OBJECTIVE = "Anchor"  # in VISFT_OBJECTIVES_REGISTRY
    anchor.WEIGHT = 1.0
    # Side of the image in pixels, both sides being resized to it; 0: the size that the tower was pretrained at.
    anchor.SIZE = 0
    # The same for this many parts of each image, drawn at random; 0: whole images alone.
    anchor.CROPS = 0
    # Every second part, at random, is grey, of another contrast, or a grey negative: of another domain.
    anchor.RECOLOR = False

    # CLIP's own loss on images and captions; text tower and logit scale are the base's, and frozen.
    visft.CONTRASTIVE = contrastive = CN()
    contrastive.OBJECTIVE = "Contrastive"
    contrastive.WEIGHT = 1.0
    contrastive.SIZE = 0  # as ANCHOR's

    # 1 - cosine between the mean dense feature of a region and the embedding that the tower before tuning has of the
    # region, cut out (CLIPSelf's idea).
    visft.SELF_DISTILLATION = distillation = CN()
    distillation.OBJECTIVE = "SelfDistillation"
    distillation.WEIGHT = 1.0
    # `boxes`: the annotated ones. `grid`: m x n parts of the image, which needs no labels.
    distillation.REGIONS = "grid"
    distillation.GRID = 6  # m and n are drawn from 1 to this
    distillation.MAX_REGIONS = 16  # of an image, drawn where there are more; 0: all

    visft.DETECTION = det = CN()
    # Class in VISFT_HEADS_REGISTRY: DETRHead, or RCNNHead (which reads detectron2's own MODEL.RPN, MODEL.ROI_* keys).
    det.HEAD = "DETRHead"
    # Number of classes; 0: as many as the metadata of DATASETS.TRAIN[0] says (`dataset_id`: its largest id + 1).
    det.NUM_CLASSES = 0
    # `contiguous`, or `dataset_id`: class outputs are the data set's own category ids (the authors' detector).
    det.LABEL_SPACE = "contiguous"
    # Start the class layer anew when a file in HEAD_FILES has another number of classes (else that is an error).
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
    # `softmax`: over the classes and no-object. `sigmoid`: each class on its own, by focal loss over the number of
    # objects (Deformable DETR); NO_OBJECT_WEIGHT is not used, and inference takes the best (query, class) pairs.
    det.CLASS_LOSS = "softmax"
    # Federated loss, for data sets whose images are annotated with some of the classes only (LVIS): this many take
    # part in an iteration's class loss, those annotated in its images and others drawn. 0: all.
    det.FED_LOSS_CLASSES = 0
    # They are drawn by the number of training images that have them, to this power.
    det.FED_LOSS_POWER = 0.5
    # Inference leaves out a box whose IoU with a better one of its class is above this. 1: none, as DETR has it; after
    # a short training, queries still repeat each other.
    det.NMS_THRESH_TEST = 1.0
    # Loss weights; the matching's costs are the same three numbers.
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
    # `softmax`: over the classes and no-object. `sigmoid`: each class on its own, by focal loss over the number of
    # objects (Deformable DETR); NO_OBJECT_WEIGHT is not used, and inference takes the best (query, class) pairs.
    seg.CLASS_LOSS = "softmax"
    # Federated loss, for data sets whose images are annotated with some of the classes only (LVIS): this many take
    # part in an iteration's class loss, those annotated in its images and others drawn. 0: all.
    seg.FED_LOSS_CLASSES = 0
    # They are drawn by the number of training images that have them, to this power.
    seg.FED_LOSS_POWER = 0.5
    seg.CLASS_WEIGHT = 2.0
    seg.MASK_WEIGHT = 5.0
    seg.DICE_WEIGHT = 5.0
    # Points a mask is compared at, and how they are chosen (PointRend).
    seg.NUM_POINTS = 12544
    seg.OVERSAMPLE_RATIO = 3.0
    seg.IMPORTANCE_RATIO = 0.75

    visft.CAPTIONING = cap = CN()
    # CaptionHead (LSTM with soft attention, the authors'), or TransformerCaptionHead.
    cap.HEAD = "CaptionHead"
    # File of the words, as tools/build_vocabulary.py writes it, or the authors' word map. "": the run's own
    # (vocabulary.json in its OUTPUT_DIR), which training builds from the captions of DATASETS.TRAIN.
    cap.VOCABULARY = ""
    # Start the words' layers anew when a file in HEAD_FILES has another number of words (else that is an error); then
    # HEAD_FILES give no vocabulary.
    cap.REINIT_CLASSES = False
    # How often a word must occur in these captions to get into the vocabulary.
    cap.MIN_WORD_COUNT = 5
    # Most words of a caption; longer ones are cut in training.
    cap.MAX_LENGTH = 30
    # Captions that inference follows at a time; 1: the most probable word at each step.
    cap.BEAM_SIZE = 3
    # The feature map is averaged to GRID x GRID cells.
    cap.GRID = 14
    # Width of a word (TransformerCaptionHead: of everything but its MLPs).
    cap.EMBEDDING_DIM = 384
    # Before the words' scores (TransformerCaptionHead: in every layer; 0.1 is usual there).
    cap.DROPOUT = 0.5
    # CaptionHead alone: width of its attention, width of its state, weight of the doubly stochastic regulariser.
    cap.ATTENTION_DIM = 384
    cap.HIDDEN_DIM = 384
    cap.ATTENTION_WEIGHT = 1.0
    # TransformerCaptionHead alone.
    cap.NUM_LAYERS = 3
    cap.NUM_ATTENTION_HEADS = 8
    cap.FEEDFORWARD_DIM = 1024

    # The frozen text encoder as a head: regions against the names of their classes. It has no weights.
    visft.REGION_TEXT = text = CN()
    text.HEAD = "RegionTextHead"
    text.WEIGHT = 1.0
    # `masks`: a region is its mask, or its box where there is none. `boxes`: its box.
    text.REGIONS = "masks"
    # What a name is put into. The default is the seven that OpenAI found best for photographs.
    text.PROMPTS = (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    )
    # What cosines are multiplied by; 0: the base's own (about 100).
    text.LOGIT_SCALE = 0.0
    # `softmax` over the names, `sigmoid` for each name, `auto`: as the base was trained (SigLIP: sigmoid, its bias
    # added).
    text.LOSS = "auto"
    # As DETECTION's: names that do not take part in an iteration are no negatives (LVIS).
    text.FED_LOSS_CLASSES = 0
    text.FED_LOSS_POWER = 0.5

    # Inference and evaluation with any names: what heads with queries find is named by the text encoder, with
    # REGION_TEXT's PROMPTS and LOSS, and takes the place of their own output.
    visft.OPEN_VOCABULARY = names = CN()
    # Names; or one entry: `coco`, `lvis`, `objects365`, a .txt file with a name a line, or `test`: the classes of the
    # data set that is evaluated. (): off.
    names.NAMES = ()
    # The score is objectness^OBJECTNESS_POWER x probability^TEXT_POWER (FC-CLIP's for classes not trained on).
    names.OBJECTNESS_POWER = 1.0
    names.TEXT_POWER = 0.8
    # What cosines are multiplied by; 0: the base's own.
    names.LOGIT_SCALE = 0.0
    # Names that compete with NAMES and are not reported.
    names.OTHERS = ("background",)


def _add_run(cfg: CN) -> None:
    cfg.VISFT = run = CN()
    # Stages that tools/train_net.py runs, in this order. `heads`: the tower is frozen, the heads train. `lora`, the
    # tower's stage: the heads are frozen, LoRA in the tower trains (or what MODEL.VISFT.TUNE and FREEZE_HEADS say). A
    # stock trainer runs the first of them with SOLVER.*.
    run.STAGES = ("heads", "lora")
    # Whether a stage that another one follows is evaluated at its end. The last one always is, and so is the first if
    # nothing was evaluated before it.
    run.EVAL_BETWEEN_STAGES = True
    # `joint`: the images of an iteration pass the tower once and feed every head whose labels they carry. `ratio`: an
    # iteration draws one task, and feeds its head alone, from images with its labels (the authors').
    run.TASK_MIXING = "joint"
    # With `ratio`: how often each task is drawn, in the order of MODEL.VISFT.HEADS, in any unit; (): equally often.
    run.TASK_RATIOS = ()
    # With `ratio`: what a task has of its own, by its head. A head without a node here has the common values.
    run.TASKS = CN({"DETECTION": task(), "SEGMENTATION": task(), "CAPTIONING": task()})
    # How captions are scored: some of BLEU, ROUGE_L, CIDEr (all without Java), METEOR, SPICE (Java programs; SPICE
    # also needs Stanford CoreNLP 3.6.0 in pycocoevalcap's spice/lib).
    run.CAPTION_METRICS = ("BLEU", "ROUGE_L", "CIDEr")
    # Minutes that processes wait for one another before they give up; more than one of them takes to score or to save.
    run.PROCESS_TIMEOUT = 60.0
    # Formats written to OUTPUT_DIR/export after the last stage, of open_clip, timm, hf, onnx, safetensors, lora,
    # authors, peft; (): none.
    run.EXPORT = ("open_clip",)

    # Own data in COCO format, without code: when set, DATASETS.TRAIN / DATASETS.TEST are made of them.
    run.DATA = data = CN()
    data.TRAIN_JSON = ""
    data.TRAIN_IMAGES = ""
    data.TEST_JSON = ""
    data.TEST_IMAGES = ""
    # Captions of their images, files in the format of COCO's captions_*.json; "": none. Captions and IMAGES without
    # JSON make a data set of captions alone.
    data.TRAIN_CAPTIONS = ""
    data.TEST_CAPTIONS = ""
    # Images of more pixels are refused, in whatever data set: a small file may fill the memory. 0: none are.
    data.MAX_PIXELS = 178_956_970

    # Of detectron2's INPUT, tools/train_net.py reads MIN_SIZE_*, MAX_SIZE_* and RANDOM_FLIP for ViSFT runs; FORMAT must
    # be RGB. MASK_FORMAT and CROP are for detectron2's stock mapper alone: ours reads polygons and bitmaps alike.
    # How training images are resized: `detection` (short side of INPUT.MIN_SIZE_TRAIN, half the time after a random
    # crop, as DETR), `lsj` (large-scale jitter to INPUT_SIZE, as Mask2Former), `fixed` (long side INPUT_SIZE, no crop),
    # `square` (both sides INPUT_SIZE).
    run.INPUT = inp = CN()
    inp.AUGMENTATION = "detection"
    inp.SIZE = 1024
    inp.JITTER_SCALE = (0.1, 2.0)
    inp.CROP_RESIZE = (400, 500, 600)
    inp.CROP_SIZE = (384, 600)
    inp.CROP_PROBABILITY = 0.5

    # Memory in GiB, in each process, for the frozen tower's features in stage `heads`: an image that comes again
    # unchanged (`fixed`, `square`) is not computed again. Then each image passes the tower alone. 0: off.
    run.FEATURE_CACHE = 0.0

    run.SOLVER = CN()
    run.SOLVER.HEADS = _solver(base_lr=5e-5, max_iter=150000)
    run.SOLVER.LORA = _solver(base_lr=1e-5, max_iter=100000)

    # Go on without images that are missing, broken, too large or of another size than annotated, with a count, instead
    # of stopping at the first.
    cfg.DATALOADER.SKIP_BROKEN = False


def task() -> CN:
    """Keys of a task (`VISFT.TASKS.<HEAD>`): 0, "" and () stand for the common value, named in brackets."""
    node = CN()
    node.IMS_PER_BATCH = 0  # over all processes, in both stages (VISFT.SOLVER.<STAGE>.IMS_PER_BATCH)
    node.AUGMENTATION = ""  # (VISFT.INPUT.AUGMENTATION)
    node.SIZE = 0  # of all but `detection` (VISFT.INPUT.SIZE)
    node.MIN_SIZE_TRAIN = ()  # of `detection` (INPUT.MIN_SIZE_TRAIN)
    node.MAX_SIZE_TRAIN = 0  # of `detection` (INPUT.MAX_SIZE_TRAIN)
    return node


def _solver(base_lr: float, max_iter: int) -> CN:
    solver = CN()
    solver.IMS_PER_BATCH = 8  # over all processes
    solver.BASE_LR = base_lr
    solver.WEIGHT_DECAY = 1e-4
    solver.MAX_ITER = max_iter
    solver.WARMUP_ITERS = 2000  # linear, then cosine to 0 at MAX_ITER
    solver.CLIP_NORM = 0.1  # L2 norm of the gradient over all that trains; 0: no clipping
    solver.ACCUMULATE = 1  # batches a step: gradients are averaged over them
    solver.CHECKPOINT_PERIOD = 5000
    solver.KEEP_CHECKPOINTS = 2  # the latest stay; 0: all, as for a curve over iterations
    solver.EVAL_PERIOD = 0  # after a checkpoint of its own; 0: after the stage's last iteration only
    # "" (float32), "bfloat16" (CPU and CUDA), "float16" (CUDA, with loss scaling), or "auto": bfloat16 on a GPU that
    # computes in it, else float32. Evaluation and prediction have the last stage's.
    solver.AMP = ""
    return solver
