"""The configuration keys of torchreid itself."""

import yaml

# torchreid 1.4.0, scripts/default_config.py, written out.
TORCHREID = yaml.safe_load("""
model: {name: resnet50, pretrained: true, load_weights: "", resume: ""}
data:
  {type: image, root: reid-data, sources: [market1501], targets: [market1501], workers: 4, split_id: 0, height: 256,
   width: 128, combineall: false, transforms: [random_flip], k_tfm: 1, norm_mean: [0.485, 0.456, 0.406],
   norm_std: [0.229, 0.224, 0.225], save_dir: log, load_train_targets: false}
market1501: {use_500k_distractors: false}
cuhk03: {labeled_images: false, classic_split: false, use_metric_cuhk03: false}
sampler:
  {train_sampler: RandomSampler, train_sampler_t: RandomSampler, num_instances: 4, num_cams: 1, num_datasets: 1}
video: {seq_len: 15, sample_method: evenly, pooling_method: avg}
train:
  {optim: adam, lr: 0.0003, weight_decay: 0.0005, max_epoch: 60, start_epoch: 0, batch_size: 32, fixbase_epoch: 0,
   open_layers: [classifier], staged_lr: false, new_layers: [classifier], base_lr_mult: 0.1,
   lr_scheduler: single_step, stepsize: [20], gamma: 0.1, print_freq: 20, seed: 1}
sgd: {momentum: 0.9, dampening: 0.0, nesterov: false}
rmsprop: {alpha: 0.99}
adam: {beta1: 0.9, beta2: 0.999}
loss:
  {name: softmax, softmax: {label_smooth: true}, triplet: {margin: 0.3, weight_t: 1.0, weight_x: 0.0}}
test:
  {batch_size: 100, dist_metric: euclidean, normalize_feature: false, ranks: [1, 5, 10, 20], evaluate: false,
   eval_freq: -1, start_eval: 0, rerank: false, visrank: false, visrank_topk: 10}
""")


def names(values=TORCHREID, prefix=""):
    """The dotted names of all keys."""
    found = {"use_gpu"}
    for key, value in values.items():
        found |= names(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return found
