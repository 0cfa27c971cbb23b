"""Every key jaxlm knows, with its default. A preset is this plus a few lines.

Durations (the keys made with `duration`) take a number of steps, or a string: "5%" of the run, "20M tokens".
"""

from ml_collections import ConfigDict, FieldReference


def duration(steps):
    """A config value that may be an int (steps) or a string ("5%", "20M tokens")."""
    return FieldReference(steps, field_type=object)


def get_config(arg: str = "") -> ConfigDict:
    del arg
    c = ConfigDict()
    c.seed = 0  # parameters, data order, dropout
    c.steps = 1000  # optimizer steps of the whole run
    c.batch_size = 32  # sequences per optimizer step, over all devices
    c.seq_len = 256  # tokens per sequence
    c.stages = ()  # smaller batches, shorter rows to begin with: (("5%", {"batch_size": 8}), ("20%", {"seq_len": 128})): until,
    # as steps or tokens from the start, and what differs; then the run's own (docs/research.md)
    c.grad_accum_steps = 1  # micro-batches the batch is cut into; same result, less memory
    c.imports = ()  # modules imported first, which register out-of-tree parts: ("my_ablation",)

    c.model = ConfigDict()
    c.model.family = "decoder"  # decoder, encoder (every token sees all), encoder_decoder (a decoder that looks at a text)
    c.model.num_layers = 4
    c.model.encoder_layers = 0  # of family=encoder_decoder; 0: num_layers
    c.model.embed_dim = 128
    c.model.num_heads = 4
    c.model.num_kv_heads = 0  # 0: num_heads. Fewer is GQA, 1 is MQA
    c.model.head_dim = 0  # 0: embed_dim / num_heads
    c.model.mlp_dim = 0  # hidden size of the feed-forward, or of each expert; 0: 4 * embed_dim
    c.model.vocab_size = 0  # 0: the tokenizer's size rounded up to vocab_multiple
    c.model.vocab_multiple = 1  # 128 on accelerators: matrix units like whole tiles
    c.model.norm = "rms"  # rms, layer, none
    c.model.norm_eps = 1e-6
    c.model.norm_scale = True  # learned scale (and bias, for layer) in each norm
    c.model.norm_scale_from_one = False  # of rms: stored is what the scale is above 1 (Gemma)
    c.model.norm_place = "pre"  # pre: before attention and feed-forward; post: after (OLMo 2); both (Gemma);
    # sum: of the residual stream after each is added (BERT)
    c.model.token_types = 0  # kinds of tokens with a vector each, added to the embedding (BERT: 2)
    c.model.embed_norm = False  # one more norm right after the embedding
    c.model.ngram_max = 1  # also embed the last 2 ... ngram_max tokens, hashed (arXiv:2412.09871); 1: tokens alone
    c.model.ngram_buckets = 8192  # vectors for each n
    c.model.position = "rope"  # rope, learned, relative (T5), none
    c.model.relative_buckets = 32  # of relative: numbers that each head has for distances,
    c.model.relative_max_distance = 128  # from which on all have the same
    c.model.rope_theta = 10000.0
    c.model.rope_theta_local = 0.0  # >0: of layers with a window, which are then not scaled (Gemma 3); 0: as all
    c.model.rope_fraction = 1.0  # share of each head that is rotated
    c.model.rope_pattern = "R"  # repeated over layers: R rotated, N not. "RRRN" is SmolLM3
    c.model.rope_scaling = "none"  # for longer contexts than trained on: none, linear, llama3, yarn, longrope
    c.model.rope_factor = 1.0  # of rope_scaling: how many times longer
    c.model.rope_original_len = 8192  # of llama3, yarn, longrope: the length trained on
    c.model.rope_low_freq_factor = 1.0  # of llama3: waves longer than rope_original_len / this are scaled,
    c.model.rope_high_freq_factor = 4.0  # shorter than rope_original_len / this are not
    c.model.rope_beta_fast = 32.0  # of yarn: turns in rope_original_len from which waves are not scaled,
    c.model.rope_beta_slow = 1.0  # and up to which they are
    c.model.rope_truncate = True  # of yarn: the waves scaled in part begin and end at whole places (GPT-OSS: not)
    c.model.rope_attention_factor = 0.0  # of yarn, longrope: multiplies the rotated queries and keys; 0: as their papers say
    c.model.rope_short_factors = ()  # of longrope: divisor of each frequency while seq_len <= rope_original_len,
    c.model.rope_long_factors = ()  # and where it is longer
    c.model.attention = "multihead"  # multihead (MHA, GQA or MQA by num_kv_heads), latent (DeepSeek)
    c.model.kv_rank = 512  # of latent: size of the vector that all keys and values of a token are made of
    c.model.query_rank = 0  # of latent: of the one that queries are made of; 0: of the block's input itself
    c.model.latent_norm_eps = 0.0  # of latent: of the norms of these two vectors; 0: norm_eps
    c.model.value_head_dim = 0  # of latent: size of a value; 0: head_dim
    c.model.qk_norm = False  # norm of queries and keys
    c.model.qk_norm_over = "head"  # each head by itself, or "all" heads together (OLMo 2)
    c.model.window = 0  # sliding-window length in tokens; 0: none
    c.model.window_pattern = "G"  # repeated over layers: L local (window), G global. "LLLLLG" is Gemma 3
    c.model.prefix_attention = False  # of data.form=pair: a prompt's tokens see one another (prefix LM, arXiv:1910.10683)
    c.model.attention_softcap = 0.0  # cap*tanh(scores/cap); 0: none
    c.model.attention_scale_dim = 0  # scores are multiplied by 1/sqrt of this; 0: head_dim
    c.model.attention_sinks = False  # a learned logit for each head joins the softmax and brings no value (GPT-OSS)
    c.model.attention_score_factor = 1.0  # multiplies scores too (DeepSeek with yarn)
    c.model.attention_bias = False
    c.model.attention_out_bias = True  # with attention_bias: the output projection has one too (Qwen 2: not)
    c.model.feedforward = "swiglu"  # swiglu, geglu, clamped_swiglu (GPT-OSS), gelu, gelu_exact, relu, relu2, moe (of experts)
    c.model.mlp_bias = False  # of experts too
    c.model.num_experts = 8  # the keys from here to bias_update_rate are of feedforward=moe
    c.model.experts_per_token = 2
    c.model.expert_form = "swiglu"  # what an expert is: one of the other feed-forwards
    c.model.shared_experts = 0  # experts that see every token, beside the routed ones
    c.model.first_dense_layers = 0  # so many layers at the start have one feed-forward of expert_form
    c.model.dense_mlp_dim = 0  # its hidden size; 0: mlp_dim
    c.model.router_score = "softmax"  # softmax, sigmoid
    c.model.router_bias = False  # a learned bias of the router's logits
    c.model.router_choice_bias = False  # a bias of each expert that has a say in the choice only (DeepSeek-V3)
    c.model.router_normalize = True  # the weights of a token's experts sum to 1
    c.model.router_scale = 1.0  # multiplies the weights of a token's experts
    c.model.router_groups = 1  # the experts are in equal groups,
    c.model.router_groups_per_token = 1  # and a token goes to experts of so many of them only:
    c.model.router_group_best = 1  # those with the highest sum of the scores of their so many best experts (DeepSeek-V3: 2)
    c.model.routing = "dropless"  # dropless, or capacity: an expert takes only so many tokens of a row, the rest pass it by
    c.model.capacity_factor = 1.25  # of routing=capacity: places of an expert in a row, as a multiple of its equal share
    c.model.load_balance_weight = 0.01  # of the load-balance loss of each row, summed over layers
    c.model.router_z_weight = 0.0  # of mean(logsumexp(router logits)^2), summed over layers
    c.model.bias_update_rate = 0.0  # loss-free balancing (arXiv:2408.15664): router_choice_bias, set then, moves so much a step
    c.model.block = "serial"  # serial, parallel
    c.model.masked_lm_head = False  # of family=encoder: a layer and a norm before the head, and a bias of the logits
    c.model.pooler = False  # of family=encoder: a layer on the first token's vector
    c.model.num_classes = 0  # of texts: a classification head, in place of that for tokens; 0: none, or as many as data.classes
    c.model.pooling = "last"  # what the head sees of a text: its last token (of decoders), first (BERT), or the mean of all
    c.model.decoder_start = -1  # of family=encoder_decoder: the id its text begins with; -1: the tokenizer's end token (T5: 0)
    c.model.tie_embeddings = True
    c.model.embed_scale = 1.0  # multiplies the embedding's output; Gemma: sqrt(embed_dim)
    c.model.logit_scale = 1.0  # multiplies logits; T5: 1/sqrt(embed_dim)
    c.model.final_softcap = 0.0  # cap*tanh(logits/cap); 0: none
    c.model.value_residual = False  # mix the first layer's values into each layer's (arXiv:2410.17897)
    c.model.dropout = 0.0
    c.model.token_dropout = 0.0  # share of tokens hidden in training, their embedding set to zero (arXiv:1512.05287)
    c.model.init_std = 0.02  # normal(0, init_std) for embedding; hidden weights use 1/sqrt(fan_in) if init_fan_in
    c.model.init_fan_in = False
    c.model.parametrization = "standard"  # standard, mup, completep: what is tuned on a model of these sizes holds for this one
    c.model.base_embed_dim = 0  # of mup, completep: width of the tuned model, whose other widths grow with it (docs/ensembles.md)
    c.model.base_head_dim = 0  # of mup, completep: its head_dim; 0: as here, so that there are more heads, not wider ones
    c.model.base_num_layers = 0  # of completep: its depth
    c.model.zero_init_proj = False  # attention output, feed-forward output and an untied head start at zero
    c.model.param_dtype = "float32"
    c.model.compute_dtype = "float32"  # bfloat16 on accelerators
    c.model.scan_layers = False  # one compiled layer looped (fast compile) or all unrolled (fast step)
    c.model.scan_unroll = 1  # of scan_layers: so many layers (whole window patterns) in each turn of the loop
    c.model.remat = "none"  # none, minimal, save_dots, save_attention, offload, full, or tensors to keep: "attention,offload:up"
    c.model.lora_rank = 0  # of adapters beside the layers' products (LoRA); where there are any, they alone train. 0: none
    c.model.lora_alpha = 16.0  # an adapter counts lora_alpha / lora_rank
    c.model.lora_modules = r"attention\.(query|value)"  # regex on attention.{query,key,value,out}, feedforward.{up,gate,down},
    # feedforward.experts.{up,gate,down}, embedding, head
    c.model.from_pretrained = ""  # whose parameters start this run: a jaxlm run, a Hugging Face folder, org/name[@revision]
    c.model.from_scratch = ""  # regex on the parameter's path: those that from_pretrained does not give, such as a new head
    c.model.adapter = ""  # a folder in PEFT's form: the adapters that this run starts with; it sets the three lora keys

    c.objective = ConfigDict()
    c.objective.name = "next_token"  # next_token, classification (data.form=label), seq2seq (family=encoder_decoder),
    # dpo, orpo, simpo (data.form=preference), distillation (of objective.teacher)
    c.objective.z_loss = 0.0  # weight of mean(logsumexp^2)
    c.objective.label_smoothing = 0.0  # of dpo: share of the pairs taken to be the wrong way round
    c.objective.beta = 0.1  # of dpo, simpo: multiplies differences of log-probabilities; of orpo: weight of the odds ratio
    c.objective.length_normalized = False  # of dpo: means of log-probabilities over an answer's tokens, not sums
    c.objective.margin = 1.0  # of simpo: what the chosen answer is to be ahead
    c.objective.teacher = ""  # of distillation: a run or a Hugging Face folder with the same tokenizer
    c.objective.teacher_weight = 0.5  # share of the teacher in the loss; the rest is the cross-entropy of the text
    c.objective.temperature = 1.0  # softens both distributions before they are compared
    c.objective.kl = "forward"  # forward: KL(teacher || student); reverse: KL(student || teacher)
    c.objective.class_weights = ()  # of classification: what an example of each class counts; (): all 1;
    # ("balanced",): n / (classes * count), counted of the training examples

    c.data = ConfigDict()
    c.data.source = "files"  # files, synthetic
    c.data.path = "shakespeare"  # "shakespeare" (ships with jaxlm), a file, glob, URL, saved dataset, or a comma-separated list
    c.data.mixture = ()  # in place of path, sources: (("web", "web/*.jsonl", 0.7), ("code", "code/*.jsonl", 0.3)): name, path,
    # weight, and, where there is to be a limit, the most epochs, after which the others share its weight
    c.data.mixture_by = "given"  # a source's weight is multiplied by: given (1), its tokens, its documents
    c.data.mixture_temperature = 1.0  # share of the rows ~ weight^(1/T)
    c.data.mixture_stages = ()  # ((1000, {"web": 0.5, "code": 0.5}),): other weights from a step on; those not named are 0
    c.data.valid_path = ""  # empty: the last valid_fraction of the text is held out
    c.data.valid_fraction = 0.1
    c.data.valid_every = 0  # >0: instead every n-th document is held out (9, 19, ... counted from 0, for 10)
    c.data.test_path = ""  # for `jaxlm eval --split=test`; nothing is learned from it
    c.data.folds = 0  # of examples: the training split is dealt out to so many folds, each class evenly (cross-validation);
    c.data.fold = 0  # this one is held out. 0 folds: off
    c.data.root = ""  # relative paths start here; empty: the current directory
    c.data.store_dir = ""  # token stores; empty: $JAXLM_CACHE, or ~/.cache/jaxlm
    # What a document is: text (all of it is told), or an example: pair (data.prompt -> data.target), label (data.prompt ->
    # class), chat (messages, ShareGPT, Alpaca, through the chat template: answers are told), preference (chosen, rejected)
    c.data.form = "text"
    c.data.prompt = ""  # of pair, label: what is given, with fields of the record: "{de} => "; empty: "{prompt}", the text field
    c.data.target = ""  # of pair: what is told; a field that is a list has several right answers; empty: "{target}"
    c.data.label_field = "label"  # of label: the class, by name,
    c.data.classes = ()  # one of these: ("negative", "positive")
    c.data.parallel = ()  # of pair: ("de", "en"): path a/train is a/train.de and a/train.en, whose lines are fields of a record
    c.data.source_len = 0  # of family=encoder_decoder: tokens of the encoder's text; 0: seq_len
    c.data.document = "file"  # what one document is in a text file: file, line. A record of another format is always one
    c.data.text_field = "text"  # of a record (jsonl, csv, tsv, parquet, arrow, array_record): where its text is
    c.data.header = True  # of csv, tsv: the first row names the fields; False: they are "0", "1", ...
    c.data.array_record = "json"  # what a record of .array_record is: json, text, tf_example
    c.data.errors = "strict"  # invalid UTF-8: strict (stop and say where) or replace
    c.data.on_error = "stop"  # a record that cannot be read: stop (and say where) or skip (counted, in the log and the manifest)
    c.data.tokenizer = "char"  # byte, char, bpe or unigram (trained on this text), or a path: tokenizer.json, .model, a folder
    c.data.bpe_vocab_size = 8192  # for tokenizer=bpe, unigram
    c.data.special_tokens = ()  # for tokenizer=bpe, unigram: more tokens that no text is cut into, such as "<|im_start|>"
    c.data.workers = 0  # processes that make tokens; 0: as many as cores. The same store comes out of any number
    c.data.packing = "concat"  # rows: concat (documents one after another, cut every seq_len), best_fit (whole documents, the
    # rest of a row is padding), one (document each; of a longer one than a row, as many as it takes)
    c.data.isolate_documents = False  # packed documents do not attend to one another
    c.data.shuffle = True
    c.data.jitter = False  # move the row grid by a random offset each epoch, so that rows are new
    c.data.prefetch = 2  # batches made ready ahead of the step

    c.prepare = prepare()

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw, muon, lion, adafactor, adan, novograd, rmsprop, sgd, ...: jaxlm/optimizers/
    c.optimizer.learning_rate = 3e-4
    c.optimizer.weight_decay = 0.1  # decoupled: p -= lr * wd * p
    c.optimizer.clip_norm = 1.0  # global gradient norm; 0: off
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.b3 = 0.99  # adan: of the squares
    c.optimizer.eps = 1e-8
    c.optimizer.momentum = 0.95  # muon, sgd
    c.optimizer.nesterov = True  # muon, sgd
    c.optimizer.adam_lr_ratio = 0.15  # muon: Adam's learning rate (embedding, head, vectors) as a share of Muon's
    c.optimizer.muon_steps = 5  # Newton-Schulz iterations
    c.optimizer.moment_dtype = "float32"
    # (regex on the parameter's path, learning-rate multiplier, weight-decay multiplier): each parameter must match exactly one
    c.optimizer.groups = (
        (r".*(embedding|kernel|lora_[ab])", 1.0, 1.0),
        (r".*(scale|bias|mix)", 1.0, 0.0),
    )
    c.optimizer.freeze = ""  # regex on the parameter's path: those that do not train (no gradient, no moments)
    c.optimizer.nonfinite = "stop"  # a non-finite loss or gradient: stop (exit 3), or skip the update
    c.optimizer.ema_decay = 0.0  # >0: keep a moving average of the parameters and evaluate with it

    c.schedule = ConfigDict()
    c.schedule.name = "cosine"  # constant, linear, cosine, inverse_sqrt, wsd
    c.schedule.warmup_steps = duration("1%")
    c.schedule.decay_steps = duration("20%")  # of wsd: the last part
    c.schedule.decay_shape = "linear"  # of wsd: linear, 1-sqrt
    c.schedule.final_fraction = 0.1  # the last learning rate as a share of the peak

    c.mesh = ConfigDict()  # devices along each axis; -1: the rest. It changes speed and memory, never the loss
    c.mesh.auto = False  # choose the sizes below by memory and batch, and say why; also written --config.mesh=auto
    c.mesh.data = -1  # rows; parameters repeated
    c.mesh.fsdp = 1  # rows; parameters and optimizer state cut up (ZeRO)
    c.mesh.tensor = 1  # heads, feed-forward and vocabulary (Megatron), the sequence between them
    c.mesh.context = 1  # the sequence
    c.mesh.expert = 1  # rows; experts dealt out
    c.mesh.stage = 1  # layers: a pipeline
    c.mesh.dcn_data = 1  # of `data`, the factor that goes over the slow network between slices or nodes
    c.mesh.dcn_fsdp = 1
    c.mesh.dcn_stage = 1
    c.mesh.zero_stage = 3  # cut up over fsdp: 3 parameters, gradients and optimizer state; 1 optimizer state only
    c.mesh.pipeline_microbatches = 0  # parts of a micro-batch that fill the pipeline; 0: 2 a stage, or fewer if they must divide
    c.mesh.pipeline_repeats = 1  # 1: GPipe; more: circular, each stage holds that many runs of layers and idles less

    c.kernels = ConfigDict()
    c.kernels.attention = "auto"  # auto, plain, blockwise, cudnn (GPU), splash (TPU)
    c.kernels.embedding_gradient = "auto"  # of the token and n-gram tables: auto, scatter, onehot, sort
    c.kernels.loss = "auto"  # auto, plain, chunked
    c.kernels.fused_projections = "auto"  # one product for q, k, v, one for gate, up: auto (with mesh.tensor), always, never
    c.kernels.grouped_matmul = "auto"  # of feedforward=moe: auto, plain, ragged_dot, blocked, gmm
    c.kernels.quantization = "none"  # of layers' matrix products: none, int8, fp8 (head, embedding, routed experts never)
    c.kernels.quantized_modules = r"(attention|feedforward)\..*"  # a regex on attention.query ... feedforward.down
    c.kernels.compiler_options = ""  # of XLA, beside those set for the hardware: "xla_a=true,xla_b=3"; "xla_a=" unsets one
    c.kernels.context = "ring"  # with mesh.context > 1: ring (memory stays cut up) or all_gather of keys and values

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = duration("25%")  # 0: the last step only, which is always saved
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.checkpoint.keep_every_steps = duration(0)  # also keep each of these for good
    c.checkpoint.keep_best = False  # also save and keep the evaluation with the best eval.metric: what eval and generate then use

    c.eval = ConfigDict()
    c.eval.every_steps = duration("25%")  # 0: after the last step only
    c.eval.batches = 0  # 0: the whole validation split
    c.eval.batch_size = 0  # 0: batch_size
    c.eval.metric = "loss"  # of evaluations, the best: loss, perplexity, bits_per_byte, or accuracy (of objectives that tell it)
    c.eval.patience = 0  # >0: so many evaluations in a row without a better eval.metric end the run; the best is kept
    c.eval.stride = 0  # >0: windows overlap; each target counts once, with at least seq_len - stride tokens before it. 0: off
    # With data.form=pair, `jaxlm eval` answers each prompt and scores it: bleu, bleu_lowercase, bleu_zh, chrf, rouge,
    c.eval.text_metrics = ()  # rouge_characters (jaxlm/evaluate/text_metrics.py); (): no answers are written
    c.eval.beams = 1  # texts that the search keeps of each answer; 1: greedy
    c.eval.length_penalty = 1.0  # of beams: log-probability / tokens ** this
    c.eval.max_new_tokens = 0  # of an answer; 0: as many as the context has room for
    c.eval.answers = 0  # while training, examples of the validation split that are answered at each evaluation; 0: none
    c.eval.sample_tokens = 0  # tokens of text written at each evaluation
    c.eval.sample_prompt = "\n"
    c.eval.tasks = ()  # questions in files (docs/evaluation.md): (("hellaswag", "hellaswag.jsonl"), ("gsm8k", "test.jsonl",
    # {"name": "gsm8k_5", "shots": 5, "shots_path": "train.jsonl"})); relative to data.root
    c.eval.lm_eval = ()  # tasks of lm-eval: ("lambada_openai", "my_task"); needs the extra lm-eval
    c.eval.lm_eval_path = ""  # a folder with task files of one's own for it
    c.eval.lm_eval_chat = False  # ask them through the tokenizer's chat template (lm-eval's --apply_chat_template)
    c.eval.task_limit = 0  # questions of each task, the first; 0: all

    c.observe = ConfigDict()
    c.observe.log_every = 10  # steps between lines of metrics.jsonl
    c.observe.internals_every = 0  # steps between looks inside the layers (docs/research.md); 100 costs 1.1 to 1.3 %; 0: none
    c.observe.progress = "auto"  # auto (live display on a terminal, else lines), live, lines, none
    c.observe.report = True  # write report.html
    c.observe.tensorboard = False
    c.observe.wandb = ""  # a Weights & Biases project name; empty: off
    c.observe.deterministic = False  # on a GPU too, a rerun is the same bit for bit; slower kernels (docs/performance.md)
    c.observe.compile_cache = True  # keep compiled programs in $JAXLM_CACHE or ~/.cache/jaxlm
    c.observe.hang_seconds = 600.0  # no step for this long: every thread's stack, exit 1 (compiling, saving: 6 times); 0: off
    c.observe.peer_seconds = 60.0  # another process silent for this long is lost: all end, exit 1
    c.observe.join_seconds = 300.0  # at start, time for all processes to come
    return c


def prepare() -> ConfigDict:
    """Of `jaxlm data prepare`: cleans what data.path names (docs/cleaning.md). Training reads none of it."""
    p = ConfigDict()
    # In this order: unicode, html, pii, punctuation, stop_words, c4, length, quality, repetition, language, exact_duplicates,
    # near_duplicates, decontaminate
    p.steps = ("unicode", "html", "length", "repetition", "exact_duplicates", "near_duplicates")
    p.split_at = ""  # a regex; a new document begins where it matches, ^ being the start of a line: "^Chapter "
    p.shard_characters = 2**25  # of a shard of work; nothing else is held in memory
    p.format = "jsonl.zst"  # of the outcome: jsonl.zst, jsonl
    p.count_tokens = ""  # for the data card: byte, or the path of a tokenizer.json; empty: not counted
    p.samples = 20  # removed documents kept to look at, for each reason; what decontamination removed is listed in full

    p.unicode = ConfigDict()
    p.unicode.repair = True  # wrongly decoded text (mojibake), by ftfy
    p.unicode.form = "NFC"  # NFC, NFKC (also full width to half width, ligatures to letters), none
    p.unicode.remove_invisible = True  # control, zero-width, direction, private-use characters; one kind of line end
    p.unicode.tidy_blanks = True  # one kind of blank, none at line ends, at most one empty line

    p.html = ConfigDict()
    p.html.main_content = True  # of whole pages: without navigation, footers and the like

    p.pii = ConfigDict()
    p.pii.kinds = ("email", "id", "ssn", "iban", "card", "ip", "phone")  # masked: [EMAIL] ...; numbers if their check digit fits

    p.punctuation = ConfigDict()
    p.punctuation.keep_inside_words = True  # don't, well-known

    p.stop_words = ConfigDict()
    p.stop_words.languages = ("en", "zh")  # the lists of jaxlm/data/cleaning/stop_words
    p.stop_words.file = ""  # more words, one a line
    p.stop_words.whole_words = False  # Chinese too only between blanks or punctuation: for text that was cut into words

    p.c4 = ConfigDict()
    p.c4.terminal_punctuation = True  # lines that end in none are removed
    p.c4.min_line_words = 5  # shorter lines are removed
    p.c4.min_sentences = 3  # documents with fewer are
    p.c4.no_javascript = True  # lines with the word are removed
    p.c4.no_policy = True  # lines with "privacy policy", "use cookies" ... are
    p.c4.no_citations = True  # [1], [edit], [citation needed] are
    p.c4.no_lorem_ipsum = True  # documents with it are
    p.c4.no_curly_bracket = True  # documents with { are
    p.c4.bad_words_file = ""  # documents with one of these words or phrases, one a line, are

    p.length = ConfigDict()  # 0: no bound
    p.length.min_characters = 1
    p.length.max_characters = 0
    p.length.min_words = 0
    p.length.max_words = 0
    p.length.max_line_characters = 0  # of the longest line: data and minified code

    p.quality = ConfigDict()  # of Gopher, arXiv:2112.11446
    p.quality.min_words = 50
    p.quality.max_words = 100_000  # 0: no bound
    p.quality.min_mean_word_length = 3.0
    p.quality.max_mean_word_length = 10.0
    p.quality.max_symbols_per_word = 0.1  # of "#", and of "..."
    p.quality.max_bullet_lines = 0.9  # share of lines that start with a bullet
    p.quality.max_ellipsis_lines = 0.3  # share of lines that end in "..."
    p.quality.min_alphabetic_words = 0.8  # share of words with a letter
    p.quality.min_stop_words = 2  # different ones of "the be to of and that have with"

    p.repetition = ConfigDict()  # of Gopher, table A1: largest shares
    p.repetition.max_duplicate_lines = 0.3
    p.repetition.max_duplicate_paragraphs = 0.3
    p.repetition.max_duplicate_line_characters = 0.2
    p.repetition.max_duplicate_paragraph_characters = 0.2
    p.repetition.max_top_ngrams = (0.2, 0.18, 0.16)  # of characters in the most frequent 2-, 3-, 4-gram of words
    p.repetition.max_duplicate_ngrams = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)  # of characters in 5- to 10-grams that come again

    p.language = ConfigDict()
    p.language.keep = ()  # ("en", "zh"); empty: all, and the language is only told
    p.language.min_score = 0.65  # probability below which a document is not kept, where `keep` is set
    p.language.characters = 4000  # of the start of a document, to tell it by

    p.exact_duplicates = ConfigDict()
    p.exact_duplicates.normalize = True  # case, punctuation and white space do not count

    p.near_duplicates = ConfigDict()
    p.near_duplicates.threshold = 0.8  # Jaccard similarity of shingles
    p.near_duplicates.shingle = 5  # words
    p.near_duplicates.bands = 20  # meet in a bucket with probability 1 - (1 - J^rows)^bands: 0.998 at J = 0.8
    p.near_duplicates.rows = 6

    p.decontaminate = ConfigDict()
    p.decontaminate.paths = ""  # evaluation files, as data.path: jsonl (all strings inside) or lines of text
    p.decontaminate.ngram = 13  # words in common that make a document go
    p.decontaminate.min_words = 8  # evaluation texts of fewer words are not looked for
    return p


def debug(c: ConfigDict) -> ConfigDict:
    """Any preset made tiny, for a laptop: 2 layers, 10 steps, synthetic data. The parts stay the preset's own."""
    c.steps = 10
    c.batch_size = 8
    c.seq_len = 32
    c.stages = ()
    c.grad_accum_steps = min(c.grad_accum_steps, 2)
    c.schedule.warmup_steps = "10%"
    c.model.num_layers = 2
    c.model.embed_dim = 64
    c.model.num_heads = 4
    c.model.num_kv_heads = min(c.model.num_kv_heads, 2)
    if c.model.attention == "latent":
        c.model.num_kv_heads, c.model.kv_rank, c.model.query_rank = 4, 32, min(c.model.query_rank, 32)
        c.model.value_head_dim, c.model.rope_fraction = 0, 0.5
    c.model.first_dense_layers, c.model.dense_mlp_dim = min(c.model.first_dense_layers, 1), min(c.model.dense_mlp_dim, 128)
    c.model.router_groups, c.model.router_groups_per_token = min(c.model.router_groups, 2), 1
    c.model.head_dim = 0
    c.model.mlp_dim = 128
    c.model.num_experts = min(c.model.num_experts, 8)
    c.model.experts_per_token = min(c.model.experts_per_token, 2)
    c.model.vocab_size = 257
    c.model.compute_dtype = "float32"
    c.data.source = "synthetic"
    c.data.tokenizer = "byte"
    c.observe.log_every = 1
    return c
