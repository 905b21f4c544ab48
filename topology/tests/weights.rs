//! Models with weights: what is read from safetensors headers, and what is refused.

mod common;

use std::fs;
use std::path::Path;

use common::{Tensor, fixture, framed, model, model_dir, plan, tensors_of, write_safetensors};
use tensorwire_core::DType;
use tensorwire_topology::{Error, ModelSpec};

fn config(name: &str) -> String {
    fs::read_to_string(fixture(name)).unwrap()
}

/// A decoder of a few kilobytes.
const TINY: &str = r#"{"model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 6, "vocab_size": 10,
    "torch_dtype": "float32"}"#;

fn tiny() -> ModelSpec {
    ModelSpec::from_config(TINY).unwrap()
}

/// What loading a directory with these tensors says.
fn refusal(config: &str, tensors: &[Tensor]) -> String {
    let dir = model_dir(config, Some(tensors));
    ModelSpec::load(dir.path()).unwrap_err().to_string()
}

#[test]
fn minilm_as_its_file_is() {
    // The names in all-MiniLM-L6-v2's file: no prefix, a pooler, and position numbers without use.
    let mut tensors = tensors_of(&model("all-minilm-l6-v2"), "F32");
    tensors.push(("pooler.dense.weight".to_owned(), "F32", vec![384, 384]));
    tensors.push(("pooler.dense.bias".to_owned(), "F32", vec![384]));
    tensors.push(("embeddings.position_ids".to_owned(), "I64", vec![1, 512]));
    let dir = model_dir(&config("all-minilm-l6-v2"), Some(&tensors));
    let spec = ModelSpec::load(dir.path()).unwrap();

    assert_eq!(spec.prefix, "");
    // Without the 147,840 of the pooler: an embedding is the mean of the last hidden states.
    assert_eq!(spec.parameters(), 22_565_376);
    assert_eq!(spec.weight_bytes(), 22_565_376 * 4);
    assert_eq!(spec.tensors.len(), model("all-minilm-l6-v2").tensors.len());
    let unused: Vec<_> = spec.unused.iter().map(|t| (t.name.as_str(), t.bytes)).collect();
    assert_eq!(
        unused,
        [("embeddings.position_ids", 4096), ("pooler.dense.bias", 1536), ("pooler.dense.weight", 589_824)]
    );
    assert_eq!(spec.weight_files().unwrap(), [dir.path().join("model.safetensors")]);

    for world in [1, 2, 3, 4, 5, 12] {
        let plan = plan(&spec, world);
        assert!(plan.tensor("pooler.dense.weight", world - 1).is_none());
        // 4096 + 1536 + 589824 bytes.
        let note = "on no rank, as embeddings are computed without: 3 tensors (embeddings.position_ids, \
                    pooler.dense.bias, pooler.dense.weight), 595.5 kB in the file";
        assert!(plan.notes.iter().any(|n| n == note), "{:?}", plan.notes);
        assert!(!plan.notes.iter().any(|n| n.contains("planned from config.json alone")));
    }
}

#[test]
fn a_location_is_where_the_bytes_are() {
    // Two tensors out of alphabetical order, so that offsets and names differ in order.
    let tensors = tensors_of(&tiny(), "F32").into_iter().rev().collect::<Vec<_>>();
    let dir = model_dir(TINY, Some(&tensors));
    let path = dir.path().join("model.safetensors");
    let spec = ModelSpec::load(dir.path()).unwrap();
    let file = fs::read(&path).unwrap();
    let mut offset = 8 + u64::from_le_bytes(file[..8].try_into().unwrap());
    for (name, _, shape) in &tensors {
        let location = spec.tensor(name).unwrap().location.unwrap();
        let bytes = 4 * shape.iter().product::<usize>() as u64;
        assert_eq!((location.file, location.offset, location.bytes), (0, offset, bytes));
        offset += bytes;
    }
    assert_eq!(offset, file.len() as u64);
}

#[test]
fn bert_inside_a_larger_model_has_a_prefix() {
    let config = r#"{"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 6, "vocab_size": 10, "max_position_embeddings": 4}"#;
    let bare = ModelSpec::from_config(config).unwrap();
    let mut tensors: Vec<Tensor> =
        tensors_of(&bare, "F32").into_iter().map(|(name, d, s)| (format!("bert.{name}"), d, s)).collect();
    tensors.push(("cls.predictions.decoder.weight".to_owned(), "F32", vec![10, 8]));
    let dir = model_dir(config, Some(&tensors));
    let spec = ModelSpec::load(dir.path()).unwrap();
    assert_eq!((spec.prefix.as_str(), spec.layer_name(0)), ("bert.", "bert.encoder.layer.0"));
    let plan = plan(&spec, 2);
    assert_eq!(plan.layers[0].name, "bert.encoder.layer.0");
    assert_eq!(plan.tensor("bert.encoder.layer.0.output.dense.weight", 1).unwrap().slices[0].dim, 1);
    assert!(plan.tensor("cls.predictions.decoder.weight", 1).is_none());
    assert_eq!(spec.unused[0].name, "cls.predictions.decoder.weight");
}

#[test]
fn shards_of_an_index_are_read() {
    let dir = model_dir(TINY, None);
    let tensors = tensors_of(&tiny(), "BF16");
    let (one, two) = tensors.split_at(tensors.len() / 2);
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    write_safetensors(&dir.path().join(names[0]), one);
    write_safetensors(&dir.path().join(names[1]), two);
    let map = |part: &[Tensor], file: &str| -> Vec<String> {
        part.iter().map(|(name, ..)| format!("{name:?}: {file:?}")).collect()
    };
    let map = [map(one, names[0]), map(two, names[1])].concat().join(",");
    let index = dir.path().join("model.safetensors.index.json");
    fs::write(&index, format!(r#"{{"metadata": {{"total_size": 1}}, "weight_map": {{{map}}}}}"#)).unwrap();

    let spec = ModelSpec::load(dir.path()).unwrap();
    assert_eq!(spec.tensors.len(), tiny().tensors.len());
    assert_eq!(spec.weight_files().unwrap().len(), 2);
    assert_eq!(spec.tensor(&one[0].0).unwrap().location.unwrap().file, 0);
    assert_eq!(spec.tensor(&two[0].0).unwrap().location.unwrap().file, 1);
    // config.json says float32; what is stored wins, and the plan counts its bytes.
    assert_eq!(spec.dtype, DType::BF16);
    assert_eq!(plan(&spec, 1).ranks[0].weight_bytes, 2 * tiny().parameters());

    // A shard that is not there, one that is outside, and one that lacks what the index promises.
    let load = || ModelSpec::load(dir.path()).unwrap_err();
    fs::write(&index, r#"{"weight_map": {"a": "gone.safetensors"}}"#).unwrap();
    assert!(matches!(load(), Error::Io { path, .. } if path.ends_with("gone.safetensors")));
    for outside in ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x/"] {
        fs::write(&index, format!(r#"{{"weight_map": {{"a": "{outside}"}}}}"#)).unwrap();
        assert!(load().to_string().contains("not a plain file name"), "{outside}: {}", load());
    }
    fs::write(&index, format!(r#"{{"weight_map": {{"nowhere": "{}"}}}}"#, names[0])).unwrap();
    assert!(load().to_string().contains("says that model-00001-of-00002.safetensors holds tensor nowhere"));
    fs::write(&index, r#"{"weight_map": 3}"#).unwrap();
    assert!(load().to_string().contains("not an index"));
    fs::write(&index, r#"{"weight_map": {"a": "b", "a": "c"}}"#).unwrap();
    assert!(load().to_string().contains("a appears twice"));
}

#[test]
fn weights_that_contradict_the_config_are_refused_by_name() {
    let with = |name: &str, change: &dyn Fn(&mut Tensor)| {
        let mut tensors = tensors_of(&tiny(), "F32");
        change(tensors.iter_mut().find(|t| t.0 == name).unwrap());
        refusal(TINY, &tensors)
    };
    let text = with("model.layers.1.self_attn.k_proj.weight", &|t| t.2 = vec![8, 8]);
    for part in ["model.safetensors", "model.layers.1.self_attn.k_proj.weight", "[8, 8]", "implies [4, 8]"] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    let text = with("model.norm.weight", &|t| t.0 = "model.nrom.weight".to_owned());
    assert!(text.contains("tensor model.norm.weight is missing"), "{text}");
    let text = with("model.embed_tokens.weight", &|t| t.0 = "embed_tokens.weight".to_owned());
    assert!(text.contains("tensor model.embed_tokens.weight is missing"), "{text}");
    let text = with("model.layers.0.mlp.up_proj.weight", &|t| t.1 = "F8_E4M3");
    assert!(text.contains("up_proj.weight is stored as F8_E4M3: only F32, F16 and BF16"), "{text}");
    // Qwen2's biases are part of it.
    let text = with("model.layers.0.self_attn.v_proj.bias", &|t| t.0 = "x".to_owned());
    assert!(text.contains("model.layers.0.self_attn.v_proj.bias is missing"), "{text}");
}

#[test]
fn a_head_is_needed_unless_it_is_the_embedding() {
    let mut tensors = tensors_of(&tiny(), "F32");
    tensors.retain(|t| t.0 != "lm_head.weight");
    assert!(refusal(TINY, &tensors).contains("tensor lm_head.weight is missing"));
    let tied = TINY.replace("\"qwen2\"", "\"qwen2\", \"tie_word_embeddings\": true");
    let dir = model_dir(&tied, Some(&tensors));
    let spec = ModelSpec::load(dir.path()).unwrap();
    assert!(plan(&spec, 2).tensor("lm_head.weight", 0).is_none());
    // Some files keep the copy, which nobody reads.
    tensors.push(("lm_head.weight".to_owned(), "F32", vec![10, 8]));
    let dir = model_dir(&tied, Some(&tensors));
    let plan = plan(&ModelSpec::load(dir.path()).unwrap(), 2);
    assert!(plan.tensor("lm_head.weight", 1).is_none());
    assert!(plan.notes.iter().any(|n| n.contains("logits are computed without: 1 tensor (lm_head.weight)")));
}

#[test]
fn what_the_model_computes_without_is_left_out_unless_it_is_large_and_unknown() {
    let mut tensors = tensors_of(&tiny(), "F32");
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), "F32", vec![2]));
    tensors.push(("model.layers.77.odd".to_owned(), "I64", vec![]));
    tensors.push(("empty".to_owned(), "F32", vec![0, 3]));
    // Qwen2 has a bias on q, k and v but not here, and it is ignored whatever its type.
    tensors.push(("model.layers.0.self_attn.o_proj.bias".to_owned(), "F8_E4M3", vec![8]));
    let dir = model_dir(TINY, Some(&tensors));
    let spec = ModelSpec::load(dir.path()).unwrap();
    let plan = plan(&spec, 3);
    let bytes: Vec<_> = spec.unused.iter().map(|t| (t.name.as_str(), t.bytes)).collect();
    let [empty, o_bias, inv_freq, odd] = bytes[..] else { panic!("{bytes:?}") };
    assert_eq!((empty, o_bias), (("empty", 0), ("model.layers.0.self_attn.o_proj.bias", 8)));
    assert_eq!((inv_freq.1, odd), (8, ("model.layers.77.odd", 8)));
    for (name, _) in bytes {
        assert!((0..3).all(|rank| plan.tensor(name, rank).is_none()));
        assert!(plan.notes.iter().any(|n| n.contains(name) && n.contains("4 tensors")), "{name}");
    }
    assert_eq!(spec.weight_bytes(), 4 * tiny().parameters());

    tensors.push(("model.layers.2.self_attn.q_proj.weight".to_owned(), "F32", vec![1 << 20, 1]));
    let text = refusal(TINY, &tensors);
    let expected =
        "model.layers.2.self_attn.q_proj.weight (F32 [1048576, 1]) is not part of a qwen2 model of 2";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn a_directory_without_weights_can_be_planned_but_not_loaded() {
    let dir = model_dir(TINY, None);
    let spec = ModelSpec::load(dir.path()).unwrap();
    assert!(!spec.has_weights());
    assert!(plan(&spec, 2).notes.iter().any(|n| n.contains("planned from config.json alone")));
    let text = spec.weight_files().unwrap_err().to_string();
    assert!(
        text.contains("no model.safetensors") && text.contains(&dir.path().display().to_string()),
        "{text}"
    );

    // A path to config.json itself is that file alone, whatever lies beside it.
    write_safetensors(&dir.path().join("model.safetensors"), &[]);
    assert!(!ModelSpec::load(&dir.path().join("config.json")).unwrap().has_weights());

    let nowhere = dir.path().join("nowhere");
    assert!(matches!(ModelSpec::load(&nowhere), Err(Error::Io { path, .. }) if path == nowhere));
    fs::remove_file(dir.path().join("config.json")).unwrap();
    let text = ModelSpec::load(dir.path()).unwrap_err().to_string();
    assert!(text.contains("config.json"), "{text}");
}

/// What loading this as model.safetensors says.
fn damage(dir: &Path, bytes: &[u8]) -> String {
    fs::write(dir.join("model.safetensors"), bytes).unwrap();
    match ModelSpec::load(dir) {
        Err(error @ (Error::Safetensors { .. } | Error::MissingTensor { .. })) => error.to_string(),
        other => panic!("{other:?} for {:?}", String::from_utf8_lossy(bytes)),
    }
}

#[test]
fn every_truncation_is_an_error_that_counts_the_bytes() {
    let dir = model_dir(TINY, Some(&tensors_of(&tiny(), "F32")));
    let whole = fs::read(dir.path().join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in (0..whole.len()).step_by(7).chain([header - 1, header, header + 1, whole.len() - 1]) {
        let text = damage(dir.path(), &whole[..length]);
        let needed = match length {
            0..8 => "at least 8".to_owned(),
            _ if length < header => format!("at least {header}"),
            _ => whole.len().to_string(),
        };
        assert!(
            text.ends_with(&format!("model.safetensors: truncated: {length} of {needed} bytes")),
            "{text}"
        );
    }
    let longer = [whole.as_slice(), &[0]].concat();
    assert!(
        damage(dir.path(), &longer).contains(&format!("{} bytes, but its header accounts for", longer.len()))
    );
}

#[test]
fn every_damaged_byte_of_a_header_is_survived() {
    let config = TINY.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    let expected = ModelSpec::from_config(&config).unwrap();
    let dir = model_dir(&config, Some(&tensors_of(&expected, "F32")));
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut refused = 0;
    for at in 0..header {
        let mut bytes = whole.clone();
        bytes[at] = [0, b'9', b'"', 0xff][at % 4];
        fs::write(&path, &bytes).unwrap();
        // Some bytes don't matter, such as those of the metadata. None may cause a panic, or a spec with
        // other tensors than the model's.
        match ModelSpec::load(dir.path()) {
            Err(_) => refused += 1,
            Ok(spec) => {
                assert!(expected.tensors.iter().all(|t| spec.tensor(&t.name).unwrap().shape == t.shape))
            }
        }
    }
    assert!(refused > header / 4 * 3, "only {refused} of {header} were refused");
}

#[test]
fn headers_that_lie_are_refused() {
    let dir = model_dir(TINY, None);
    let says = |header: &str, data: usize, what: &str| {
        let bytes = [framed(header), vec![0; data]].concat();
        let text = damage(dir.path(), &bytes);
        assert!(
            text.contains("model.safetensors: ") && text.contains(what),
            "{what:?} is not in {text:?} for {header}"
        );
    };
    let tensor = |name: &str, shape: &str, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let two = |a: String, b: String| format!("{{{a},{b}}}");

    says(&two(tensor("a", "[2]", 0, 8), tensor("b", "[2]", 4, 12)), 12, "tensor b overlaps another tensor");
    says(&two(tensor("a", "[2]", 0, 8), tensor("b", "[2]", 0, 8)), 8, "tensor b overlaps another tensor");
    says(&two(tensor("a", "[2]", 0, 8), tensor("b", "[2]", 12, 20)), 20, "tensor b leaves a gap before it");
    says(&two(tensor("a", "[2]", 0, 8), tensor("a", "[2]", 8, 16)), 16, "a appears twice");
    says(&format!("{{{}}}", tensor("a", "[3]", 0, 8)), 8, "bytes 0..8 can't hold F32 [3], which takes 12");
    says(&format!("{{{}}}", tensor("a", "[2]", 8, 0)), 8, "tensor a: bytes 8..0 can't hold");
    says(&format!("{{{}}}", tensor("a", "[4294967296, 4294967296]", 0, 8)), 8, "beyond any file");
    says(&format!("{{{}}}", tensor("a", "[0]", u64::MAX, u64::MAX)), 0, "beyond any file");
    says(&format!("{{{}}}", tensor("a", "[-2]", 0, 8)), 8, "damaged: tensor a");
    says(&format!("{{{}}}", tensor("a", "[2.5]", 0, 8)), 8, "damaged: tensor a");
    says(&format!("{{{}}}", tensor("a", "[1e3]", 0, 8)), 8, "damaged: tensor a");
    says(&format!("{{{}}}", tensor("a", "[2]", 0, 1 << 40)), 8, "can't hold");
    says(&format!("{{{}}}", tensor("a", "[274877906944]", 0, 1 << 40)), 8, "truncated: ");
    says(
        r#"{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}"#,
        8,
        "tensor a: type F31 is not supported",
    );
    says(r#"{"a":{"shape":[2],"data_offsets":[0,8]}}"#, 8, "missing field `dtype`");
    says(r#"{"a":7}"#, 0, "damaged: tensor a");
    says("[]", 0, "not a safetensors file, or damaged");
    says("{", 0, "not a safetensors file, or damaged");
    says("{} {}", 0, "not a safetensors file, or damaged");
    says("\u{fffd}", 0, "not a safetensors file, or damaged");
    says("{}", 0, "tensor model.embed_tokens.weight is missing");
    says("{}", 3, "damaged: 13 bytes, but its header accounts for 10");

    let length = |n: u64| damage(dir.path(), &[n.to_le_bytes().as_slice(), b"{}"].concat());
    assert!(length(3).contains("truncated: 10 of at least 11 bytes"));
    assert!(length(100_000_000).contains("truncated: 10 of at least 100000008 bytes"));
    assert!(length(100_000_001).contains("100000001 bytes long, more than the limit"));
    assert!(length(u64::MAX).contains("more than the limit"));
    // Some other file under this name.
    assert!(
        damage(dir.path(), b"PK\x03\x04 a zip archive, as PyTorch writes them")
            .contains("not a safetensors file")
    );
}
