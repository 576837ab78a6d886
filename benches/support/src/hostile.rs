//! What the fuzz targets do with their bytes: open them as a checkpoint, take every weight, and generate
//! with the resulting model; or open them as a vocabulary, and encode and decode with it.

use std::fs;
use std::io::Result as IoResult;

use candle_core::{DType, Device};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::Weights;
use hybrid_attention::{
    Error, GenerationConfig, HybridModel, Message, Result, Thinking, Tokenizer,
};

/// `data` is a GGUF file.
///
/// # Errors
/// What the loaders, or the model, reject.
pub fn gguf(data: &[u8]) -> Result<()> {
    take_all(&Checkpoint::from_gguf_bytes(data)?)
}

/// `data` is a digit that chooses the part to open, from 1, and the parts of a split GGUF model, each of
/// which starts with `GGUF`.
///
/// # Errors
/// What the loaders, or the model, reject.
pub fn split(data: &[u8]) -> Result<()> {
    const MAGIC: &[u8] = b"GGUF";
    let mut starts: Vec<usize> =
        (0..data.len()).filter(|start| data[*start..].starts_with(MAGIC)).take(9).collect();
    let count = starts.len();
    let opened = data.first().map_or(1, |digit| digit.wrapping_sub(b'0'));
    starts.push(data.len());
    let name = |no: usize| format!("m-{no:05}-of-{count:05}.gguf");
    let write = || -> IoResult<_> {
        let folder = tempfile::tempdir()?;
        for (no, part) in starts.windows(2).enumerate() {
            fs::write(folder.path().join(name(no + 1)), &data[part[0]..part[1]])?;
        }
        Ok(folder)
    };
    let folder = write().map_err(|source| Error::Io { path: "temporary folder".into(), source })?;
    take_all(&Checkpoint::open(folder.path().join(name(opened.into())))?)
}

/// `data` is a digit that chooses the layout, then the files of a folder with a zero byte after
/// each but the last: 0 `config.json` and `model.safetensors`; 1 `params.json` and
/// `consolidated.safetensors`; 2 `config.json`, `generation_config.json`, the index and one shard.
///
/// # Errors
/// What the loaders, or the model, reject.
pub fn folder(data: &[u8]) -> Result<()> {
    let names: &[&str] = match data.first() {
        Some(b'0') => &["config.json", "model.safetensors"],
        Some(b'1') => &["params.json", "consolidated.safetensors"],
        Some(b'2') => &[
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "model-00001-of-00001.safetensors",
        ],
        _ => return Ok(()),
    };
    let parts = data[1..].splitn(names.len(), |byte| *byte == 0);
    let write = || -> IoResult<_> {
        let folder = tempfile::tempdir()?;
        for (name, part) in names.iter().zip(parts) {
            fs::write(folder.path().join(name), part)?;
        }
        Ok(folder)
    };
    let folder = write().map_err(|source| Error::Io { path: "temporary folder".into(), source })?;
    let checkpoint = Checkpoint::open(folder.path())?;
    checkpoint.generation_defaults()?;
    take_all(&checkpoint)
}

/// `data` is a `tekken.json`.
///
/// # Errors
/// What the reader rejects, and texts that it cannot encode.
pub fn tekken(data: &[u8]) -> Result<()> {
    use_all(&Tokenizer::from_tekken(data)?)
}

/// `data` is a `tokenizer.model` by SentencePiece.
///
/// # Errors
/// What the reader rejects, and texts that it cannot encode.
pub fn sentencepiece(data: &[u8]) -> Result<()> {
    use_all(&Tokenizer::from_sentencepiece(data)?)
}

/// Encodes texts, decodes all that comes of them, and writes a chat, if the tokenizer can.
fn use_all(tokenizer: &Tokenizer) -> Result<()> {
    let texts =
        ["", " the  cat sat\n", "<s>[INST] e\u{301} \u{1f680}[/INST]</s>", "▁\0[REF]aaaaaaaaaaaa"];
    for text in texts {
        for id in tokenizer.encode(text, true)? {
            assert!((id as usize) < tokenizer.vocab_size());
            tokenizer.decode(&[id, id.wrapping_add(1)], false);
        }
        if tokenizer.has_chat_template() {
            let chat = [Message::system(text), Message::user(text), Message::assistant("a")];
            tokenizer.encode_chat(&chat, true)?;
        }
    }
    Ok(())
}

/// Ends at the first weight that is missing, so a configuration that asks for a billion layers ends
/// where the file does.
fn take_all(checkpoint: &Checkpoint) -> Result<()> {
    for dtype in [None, Some(DType::F32), Some(DType::BF16), Some(DType::F16)] {
        let mut weights = checkpoint.weights(dtype, &Device::Cpu);
        for (name, shape) in checkpoint.config().weights() {
            weights.tensor(&name, &shape)?;
        }
        weights.finish()?;
    }
    let model = HybridModel::from_checkpoint(checkpoint, None, &Device::Cpu, |_, _| ())?;
    let config = GenerationConfig::default().thinking(Thinking::new(1)).max_tokens(2);
    model.generate([0], &config)?;
    Ok(())
}
