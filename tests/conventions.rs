//! What checkpoints say in files of their own is followed: public bug reports, with the right values of
//! transformers 4.57.6 and llama.cpp (llama-cpp-python 0.3.36). The model is a random Mistral of two layers.

use std::error::Error;
use std::fs;
use std::path::Path;

use candle_core::Device;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::{
    EmbedConfig, GenerationConfig, HybridModel, Message, Pooling, Sight, StopReason, Tokenizer,
};
use serde_json::{Value, json};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/cases");

/// The tokenizer of the cases with these files beside it.
fn tokenizer(files: &[(&str, Value)]) -> Result<Tokenizer> {
    let folder = tempfile::tempdir()?;
    fs::copy(Path::new(CASES).join("plain/tokenizer.json"), folder.path().join("tokenizer.json"))?;
    for (name, content) in files {
        fs::write(folder.path().join(name), content.to_string())?;
    }
    Ok(Tokenizer::from_folder(folder.path())?.ok_or("no tokenizer")?)
}

/// `tokenizer.json` of the cases puts `<s>` in front of a text and nothing behind it.
#[test]
fn bos_and_eos_stand_where_the_config_says() -> Result {
    let ids = |flags: Value| -> Result<Vec<u32>> {
        let mut config = json!({ "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>" });
        let (Some(config_fields), Some(flags)) = (config.as_object_mut(), flags.as_object()) else {
            return Err("not an object".into());
        };
        config_fields.extend(flags.clone());
        Ok(tokenizer(&[("tokenizer_config.json", config)])?.encode("the cat", true)?)
    };
    assert_eq!(ids(json!({}))?, [1, 315, 296]);
    assert_eq!(ids(json!({ "add_bos_token": true, "add_eos_token": true }))?, [1, 315, 296, 2]);
    assert_eq!(ids(json!({ "add_bos_token": true }))?, [1, 315, 296]);
    assert_eq!(ids(json!({ "add_eos_token": true }))?, [1, 315, 296, 2]);
    assert_eq!(ids(json!({ "add_bos_token": false }))?, [315, 296]);
    assert_eq!(ids(json!({ "add_bos_token": false, "add_eos_token": true }))?, [315, 296, 2]);
    // This class is `tokenizer.json` as it is.
    let both = json!({ "add_bos_token": false, "add_eos_token": true,
        "tokenizer_class": "PreTrainedTokenizerFast" });
    assert_eq!(ids(both)?, [1, 315, 296]);
    // It is true of a text, and says nothing of a chat.
    let config = json!({ "bos_token": "<s>", "eos_token": "</s>", "add_eos_token": true,
        "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}" });
    let chat = tokenizer(&[("tokenizer_config.json", config)])?;
    assert_eq!(chat.encode_chat(&[Message::user("the cat")], true)?, [1, 315, 296]);
    // Nothing can be added that is not there.
    let unnamed = tokenizer(&[("tokenizer_config.json", json!({ "add_eos_token": true }))])?;
    assert_eq!(unnamed.encode("the cat", true)?, [1, 315, 296]);
    Ok(())
}

const CHAT: &str = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A ChatML fine-tune whose new tokens its `tokenizer.json`, the base model's, does not have.
#[test]
fn tokens_are_added_from_wherever_they_stand() -> Result {
    let named = json!({ "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>",
        "chat_template": CHAT });
    let decoder = json!({
        "2": { "content": "</s>", "special": true, "normalized": false },
        "371": { "content": "<|im_end|>", "special": true, "normalized": false },
        "372": { "content": "<|im_start|>", "special": false, "normalized": false },
    });
    let mut with_decoder = named.clone();
    with_decoder["added_tokens_decoder"] = decoder;
    let file = json!({ "<|im_end|>": 371, "<|im_start|>": 372 });
    let mut with_list = named.clone();
    with_list["additional_special_tokens"] = json!(["<|im_start|>"]);
    let expected = [
        372, 290, 285, 283, 272, 282, 13, 293, 272, 316, 296, 371, 290, 13, 372, 290, 268, 283,
        283, 276, 283, 284, 317, 284, 13,
    ];
    // Of a token that is not special the older file does not say that spaces are part of other tokens.
    let normalized = [
        372, 285, 283, 272, 282, 13, 293, 272, 316, 296, 371, 290, 13, 63, 127, 276, 279, 98, 283,
        284, 268, 282, 284, 127, 65, 268, 283, 283, 276, 283, 284, 317, 284, 13,
    ];
    for (config, file, expected, is_special) in [
        (&with_decoder, None, &expected[..], false),
        (&with_list, Some(&file), &expected[..], true),
        (&named, Some(&file), &normalized[..], false),
    ] {
        let mut files = vec![("tokenizer_config.json", config.clone())];
        files.extend(file.map(|file| ("added_tokens.json", file.clone())));
        let tokenizer = tokenizer(&files)?;
        let mut ids = tokenizer.encode_chat(&[Message::user("the cat")], true)?;
        // transformers leaves BOS to the template; this crate adds it where the tokenizer does.
        assert_eq!(ids.remove(0), 1);
        assert_eq!(ids, expected);
        assert_eq!(tokenizer.eos_token_id(), Some(371));
        assert!(tokenizer.is_special(371) && tokenizer.is_special(372) == is_special);
    }
    // A gap would give a token the id of another one.
    with_decoder["added_tokens_decoder"]["400"] = json!({ "content": "<far>" });
    let error = tokenizer(&[("tokenizer_config.json", with_decoder)]).map(drop);
    let error = error.err().ok_or("accepted")?.to_string();
    assert!(error.ends_with(r#"added token "<far>": expected id 400, got 373"#), "{error}");
    Ok(())
}

/// `eos_token_id` is `</s>`, and `<|im_end|>`, 305, is in the vocabulary.
#[test]
fn a_gguf_answer_ends_at_its_end_of_turn() -> Result {
    let model = HybridModel::from_gguf(Path::new(CASES).join("eos_is_2.gguf"), None, &Device::Cpu)?;
    assert_eq!(model.eos_ids(), [2, 305]);
    let config = GenerationConfig::default().max_tokens(4);
    let answer = model.generate("the cat", &config)?;
    assert_eq!((answer.ids.as_slice(), &answer.stop), ([305].as_slice(), &StopReason::Eos));
    Ok(())
}

/// The model of the cases, with more files beside it.
fn checkpoint(files: &[(&str, Value)]) -> Result<HybridModel> {
    let folder = tempfile::tempdir()?;
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(Path::new(CASES).join("plain").join(name), folder.path().join(name))?;
    }
    for (name, content) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().ok_or("no folder")?)?;
        fs::write(path, content.to_string())?;
    }
    Ok(HybridModel::from_folder(folder.path(), None, &Device::Cpu)?)
}

/// What the authors' own code averages (`gritlm.py`, `llm2vec.py`): all tokens see all, and only the text's
/// are pooled.
#[test]
fn gritlm_and_llm2vec_leave_instruction_and_bos_out() -> Result {
    let model = checkpoint(&[])?;
    let both_ways = EmbedConfig::default().sight(Sight::Bidirectional);
    for (instruction, text, expected) in [
        (
            "<|embed|>\n",
            "the cat sat on the mat",
            [-0.03277, 0.13196, -0.09327, -0.04872, 0.14632, -0.17289],
        ),
        (
            "<|user|>\nthe dog\n<|embed|>\n",
            "hello world",
            [0.13962, 0.12768, -0.19506, 0.00032, 0.01982, -0.14288],
        ),
        ("", "hello world", [0.24646, -0.22341, 0.18438, 0.02424, 0.17471, -0.02492]),
    ] {
        let config = both_ways.clone().instruction(instruction);
        let got = model.embed(&[text], &config)?.to_vec2::<f32>()?;
        for (got, expected) in got[0].iter().zip(expected) {
            assert!((got - expected).abs() < 1.5e-5, "{instruction:?}: {got}, not {expected}");
        }
    }
    Ok(())
}

#[test]
fn files_of_sentence_transformers_are_followed() -> Result {
    let module = |kind: &str, path: &str| json!({ "name": path, "path": path, "type": format!("sentence_transformers.models.{kind}") });
    let modules = json!([
        module("Transformer", ""),
        module("Pooling", "1_Pooling"),
        module("Normalize", "2_Normalize")
    ]);
    let pooling = |mode: &str| json!({ "word_embedding_dimension": 32, "pooling_mode_mean_tokens": false, mode: true, "include_prompt": false });
    let with = |mode: &str| {
        checkpoint(&[
            ("modules.json", modules.clone()),
            ("1_Pooling/config.json", pooling(mode)),
            ("sentence_bert_config.json", json!({ "max_seq_length": 24, "do_lower_case": false })),
            (
                "config_sentence_transformers.json",
                json!({ "prompts": { "query": "the dog ", "other": "x" }, "default_prompt_name": "query" }),
            ),
        ])
    };
    let (plain, default) = (checkpoint(&[])?, EmbedConfig::default());
    let told = default.clone().instruction("the dog ").max_tokens(24);
    let text = ["hello world and all the rest of it, which is longer than it may be"];
    for (mode, kind) in [
        ("pooling_mode_lasttoken", Pooling::LastToken),
        ("pooling_mode_mean_tokens", Pooling::Mean),
        ("pooling_mode_weightedmean_tokens", Pooling::WeightedMean),
    ] {
        let got = with(mode)?.embed(&text, &default)?.to_vec2::<f32>()?;
        assert_eq!(
            got,
            plain.embed(&text, &told.clone().pooling(kind))?.to_vec2::<f32>()?,
            "{mode}"
        );
    }
    // What cannot be followed is named, and what the caller asks for goes before it.
    let cls = with("pooling_mode_cls_token")?;
    let error = cls.embed(&text, &default).err().ok_or("embedded")?.to_string();
    assert_eq!(error, "unsupported sentence-transformers pooling: pooling_mode_cls_token");
    cls.embed(&text, &default.clone().pooling(Pooling::Mean))?;
    // Nothing outside the folder is read.
    let outside = checkpoint(&[("modules.json", json!([module("Pooling", "../1_Pooling")]))])?;
    let error = outside.embed(&text, &default).err().ok_or("embedded")?.to_string();
    assert!(error.starts_with("unsupported sentence-transformers module: "), "{error}");
    Ok(())
}

/// With the EOS that the config asks for, the last token is another one.
#[test]
fn the_last_token_may_be_the_eos_that_is_added() -> Result {
    let config = json!({ "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "add_eos_token": true });
    let model = checkpoint(&[("tokenizer_config.json", config)])?;
    let last = EmbedConfig::default().pooling(Pooling::LastToken);
    let got = model.embed(&["the cat"], &last)?.to_vec2::<f32>()?;
    let expected = [0.04416, -0.04613, 0.26208, 0.22004, 0.24996, 0.13789];
    for (got, expected) in got[0].iter().zip(expected) {
        assert!((got - expected).abs() < 1.5e-5, "{got}, not {expected}");
    }
    // Cutting keeps it.
    let long = "the cat and the dog sat on the mat";
    let (all, cut) =
        (model.embed(&[long], &last)?, model.embed(&[long], &last.clone().max_tokens(3))?);
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let ids = tokenizer.encode(long, true)?;
    assert_eq!(ids.last(), Some(&2));
    let kept = tokenizer.decode(&ids[..2], true);
    assert_eq!(tokenizer.encode(&kept, true)?, [ids[0], ids[1], 2]);
    assert_eq!(cut.to_vec2::<f32>()?, model.embed(&[kept.as_str()], &last)?.to_vec2::<f32>()?);
    assert_ne!(cut.to_vec2::<f32>()?, all.to_vec2::<f32>()?);
    Ok(())
}

/// What a download leaves in the hub's cache: snapshots of links to blobs, and which of them is `main`.
#[test]
fn a_repository_in_the_hubs_cache_is_its_main_snapshot() -> Result {
    let cache = tempfile::tempdir()?;
    let repository = cache.path().join("models--org--tiny");
    let snapshot = |commit: &str| repository.join("snapshots").join(commit);
    for commit in ["0123", "4567"] {
        fs::create_dir_all(snapshot(commit))?;
    }
    fs::create_dir_all(repository.join("refs"))?;
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(Path::new(CASES).join("plain").join(name), snapshot("4567").join(name))?;
    }
    let open = || Checkpoint::open(&repository).map_err(|error| error.to_string());
    fs::write(repository.join("refs/main"), "4567\n")?;
    assert_eq!(open()?.path(), snapshot("4567"));
    assert!(HybridModel::open(&repository, None, &Device::Cpu)?.tokenizer().is_some());
    for (commit, said) in [
        ("89ab", "there is no snapshot 89ab beside it"),
        ("../4567", r#""../4567" is not the name of a snapshot"#),
        ("", r#""" is not the name of a snapshot"#),
    ] {
        fs::write(repository.join("refs/main"), commit)?;
        assert!(open().err().is_some_and(|error| error.ends_with(said)), "{commit}");
    }
    Ok(())
}

/// Token ids work where the tokenizer is of a kind that is not read, and for text the message says what to do.
#[test]
fn a_tokenizer_that_is_not_read_is_named() -> Result {
    let folder = tempfile::tempdir()?;
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(CASES).join("plain").join(file), folder.path().join(file))?;
    }
    let unigram = [0x12, 2, 0x18, 1];
    fs::write(folder.path().join("tokenizer.model"), unigram)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let config = GenerationConfig::default().max_tokens(4);
    assert_eq!(model.generate([1, 315, 296], &config)?.ids, [305, 79, 72, 365]);
    let chat = [Message::user("the cat")];
    let answers = [model.generate("the cat", &config), model.chat(&chat, &config)];
    let vectors = model.embed(&["the cat"], &EmbedConfig::default()).map(drop);
    for result in answers.map(|answer| answer.map(drop)).into_iter().chain([vectors]) {
        let error = result.err().ok_or("no error")?.to_string();
        let said =
            "unsupported SentencePiece model type: unigram; transformers makes a tokenizer.json";
        assert!(error.starts_with(said), "{error}");
    }
    // One that is broken is not passed over.
    fs::write(folder.path().join("tekken.json"), "{")?;
    let error = HybridModel::from_folder(folder.path(), None, &Device::Cpu).err();
    let error = error.ok_or("no error")?.to_string();
    assert!(
        error.ends_with("tekken.json: EOF while parsing an object at line 1 column 1"),
        "{error}"
    );
    Ok(())
}
