//! A folder of text files as a memory: what fits a question is found in it, the words that carry it are marked, and
//! the model answers by it.
//!
//! ```text
//! cargo run --release --example memory
//! cargo run --release --example memory -- SmolLM2-135M-Instruct.gguf notes/ "When does the harbour open?"
//! ```
//!
//! Here the memory lasts as long as the program. With the feature `redb`, `Memory::open("notes.redb", &model)` is
//! one that stays.

#![allow(clippy::print_stdout, reason = "a program")]

use std::error::Error;
use std::path::Path;

use candle_core::Device;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::memory::{
    Embedding, MainPoint, Memory, Note, Recall, Salience, Volatile, pieces,
};
use hybrid_attention::{HybridModel, WeightType};

/// What the model that comes with the crate understands; trying the example needs no other.
const NOTES: [&str; 3] = [
    "That day, the ball had been left in the ring. Before that, the ring had been left in the drawer.",
    "By then, the kettle was put in the crate. By then, the crate was found in the purse.",
    "The tent is in the tray. The pillow is in the trunk. That day, the tub lay in the scarf.",
];
const QUESTION: &str = "Where is the ball?\nIn the";

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (model, texts, question) = match args.as_slice() {
        [] => {
            let texts = NOTES.map(|text| ("a note".to_owned(), text.to_owned()));
            (HybridModel::tiny(&Device::Cpu)?, texts.to_vec(), QUESTION)
        }
        [path, folder, question] => {
            let (checkpoint, kept) = (Checkpoint::open(path)?, WeightType::Stored);
            let model = HybridModel::from_checkpoint(&checkpoint, kept, &Device::Cpu, |_, _| ())?;
            (model, read_folder(Path::new(folder))?, question.as_str())
        }
        _ => return Err("give a checkpoint, a folder of text files, and a question".into()),
    };

    // Whole texts are found as well as what carries them, and embedded faster; `hybrid memory eval` measures it.
    // `Embedding::MainPoint` and `Embedding::Words` embed what carries them.
    let memory = Memory::over(Volatile::default(), &model, Embedding::default())?;
    let tokenizer = model.tokenizer().ok_or("the checkpoint has no tokenizer")?;
    for (name, text) in &texts {
        for piece in pieces(tokenizer, text, 256)? {
            memory.remember(&text[piece], Note::default().source(name))?;
        }
    }

    let recall = Recall::best(3);
    let found = memory.recall(question, &recall)?;
    for note in &found {
        let source = note.note.source.as_deref().unwrap_or_default();
        println!("{:.3} {source}: {}\n", note.score, marked(&model, &note.text)?);
    }

    // The notes can be thought about, the question is only read.
    let config = model.generation_config().thinking(model.thinking().clone()).max_tokens(64);
    let answer = model.generate(memory.prompt_of(question, &found, &recall)?, &config)?;
    println!("{question} …{}", answer.text);
    Ok(())
}

/// A text with the words that carry it in bold.
fn marked(model: &HybridModel, text: &str) -> hybrid_attention::Result<String> {
    let point = MainPoint::of(model, text, &Salience::received().share(0.25))?;
    let (mut marked, mut at) = (String::new(), 0);
    for span in point.spans() {
        marked += &format!("{}\x1b[1m{}\x1b[0m", &text[at..span.bytes.start], span.text);
        at = span.bytes.end;
    }
    Ok(marked + &text[at..])
}

/// The files of a folder, by their names.
fn read_folder(folder: &Path) -> Result<Vec<(String, String)>, Box<dyn Error>> {
    let mut texts = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            texts.push((name, std::fs::read_to_string(entry.path())?));
        }
    }
    texts.sort();
    Ok(texts)
}
