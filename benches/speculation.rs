//! What guessing ahead is worth: answers that copy a passage and answers that do not, with guesses and without, taking
//! turns; and what a pass over several tokens costs beside one over one.
//!
//! ```text
//! cargo bench --bench speculation                 # f32, bf16, q8_0, q4_k
//! cargo bench --bench speculation -- bf16 q4_k
//! ```
//!
//! Needs SmolLM2 (the README fetches it). Answers are greedy, and both ways must say the same. Only decoding is timed. On
//! a machine that others use too, `-- --cpu` counts the time that its processors spend on this, each of them, instead
//! of the time that passes (Linux only).

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use hybrid_attention::generate::{PromptLookup, Speculated};
use hybrid_attention::model::{ForwardContext, Pass};
use hybrid_attention::{Answer, GenerationConfig, HybridModel, Message, Prompt, WeightType};
use hybrid_attention_testing::smollm2;

use hybrid_attention_benches::{ids, median, of_processors, sorted, unpack};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const KINDS: [(&str, WeightType); 4] = [
    ("f32", WeightType::Dense(DType::F32)),
    ("bf16", WeightType::Dense(DType::BF16)),
    ("q8_0", WeightType::Quantized(GgmlDType::Q8_0)),
    ("q4_k", WeightType::Quantized(GgmlDType::Q4K)),
];

/// Turns that each of the two takes, besides one that is not counted.
const TURNS: usize = 5;

const MAX_TOKENS: usize = 400;

/// Tokens before those of a pass whose cost is measured.
const CONTEXT: usize = 512;

/// A passage of about 300 tokens.
const PASSAGE: &str = "The harbour of Old Varn was built in 1742 by a merchant named Tobias Lindqvist, who had lost \
    two ships to the rocks below the northern cliff. He paid for a stone pier of ninety metres, a lamp that burned \
    whale oil, and a keeper who was to light it every evening at six. For thirty years nobody thanked him. Fishermen \
    said that the lamp frightened the herring, and the bishop complained that it shone into his bedroom. In the \
    winter of 1773 a storm broke the pier in three places, and the lamp went out. Eleven boats were at sea that \
    night, and only four came back. When spring came, the town voted to rebuild the pier, and every family gave what \
    it could: the baker gave bread for the masons, the school gave its bell, and the widow Amalia Brandt gave the \
    last barrel of oil from her husband's store. The new pier was finished in August 1775. It is still there, though \
    the lamp is electric now, and the keeper's house is a small museum with a blue door. On the first evening of \
    every winter the children of the town walk along the pier with lanterns, and the oldest of them reads the names \
    of the seven boats that were lost. Then the lamp is lit, and everyone goes home to eat fish soup.";

/// What is asked with the passage, of answers that copy.
const COPYING: [(&str, &str); 2] = [
    ("repeated", "Repeat the following text word for word, without changing anything:"),
    (
        "corrected",
        "Correct the spelling mistakes in the following text, and leave the rest as it is:",
    ),
];

/// What is asked without it.
const WRITING: [(&str, &str); 4] = [
    ("a story", "Write a short story about a girl who finds a map in a library."),
    ("a letter", "Write a letter to a friend about a week in the mountains."),
    ("an explanation", "Explain how bread is made, and why dough rises."),
    ("a list", "List ten things to pack for a trip to the sea, with a reason for each."),
];

fn main() -> Result {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let cpu = arguments.iter().any(|argument| argument == "--cpu");
    let asked = |name: &str| arguments.iter().any(|argument| argument == name);
    let Some(file) = smollm2() else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    unpack(&file, folder.path())?;
    let text = HybridModel::from_gguf(&file, None, &Device::Cpu)?;
    let all = !KINDS.iter().any(|(name, _)| asked(name));
    for (name, kind) in KINDS.into_iter().filter(|(name, _)| all || asked(name)) {
        let model = HybridModel::from_folder(folder.path(), kind, &Device::Cpu)?;
        // The folder has no words.
        let model = HybridModel::new(model.thought_model().clone(), text.tokenizer().cloned())?;
        println!("\n## {name}\n");
        passes(&model, cpu)?;
        answers(&model, text.eos_ids(), cpu)?;
    }
    Ok(())
}

/// Seconds of the clock, or of processors.
fn seconds<T>(cpu: bool, run: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let (start, before) = (Instant::now(), if cpu { of_processors()? } else { 0.0 });
    let done = run()?;
    let taken = if cpu { of_processors()? - before } else { start.elapsed().as_secs_f64() };
    Ok((done, taken))
}

/// What a pass over a token and some guesses takes, beside one over a token alone.
fn passes(model: &HybridModel, cpu: bool) -> Result {
    const REPEATS: usize = 8;
    let transformer = model.transformer();
    let mut cache = transformer.new_cache(CONTEXT + 16)?;
    let prompt = transformer.embed_ids(&ids(CONTEXT))?;
    transformer.forward(&prompt, transformer.all_layers(), Pass::Cached(&mut cache))?;
    let counts = [1, 2, 3, 4, 6, 8, 12, 16];
    let mut best = [f64::MAX; 8];
    for turn in 0..=TURNS {
        for (count, best) in counts.into_iter().zip(&mut best) {
            let xs = transformer.embed_ids(&ids(count))?;
            let ((), taken) = seconds(cpu, || {
                for _ in 0..REPEATS {
                    cache.truncate(CONTEXT)?;
                    let pass = ForwardContext::from(Pass::Cached(&mut cache)).one_by_one();
                    let h = transformer.forward(&xs, transformer.all_layers(), pass)?;
                    black_box(transformer.logits(&h)?);
                }
                Ok(())
            })?;
            if turn > 0 {
                *best = best.min(taken / REPEATS as f64);
            }
        }
    }
    let list = |cells: Vec<String>| println!("| {} |", cells.join(" | "));
    list(std::iter::once("tokens".into()).chain(counts.map(|it| it.to_string())).collect());
    println!("|{}", "---|".repeat(counts.len() + 1));
    list(std::iter::once("ms".into()).chain(best.map(|it| format!("{:.1}", it * 1e3))).collect());
    let share = best.map(|it| format!("{:.2}", it / best[0]));
    list(std::iter::once("of one".into()).chain(share).collect());
    Ok(())
}

/// One line for each prompt.
fn answers(model: &HybridModel, eos_ids: &[u32], cpu: bool) -> Result {
    println!(
        "\n| answer | tokens | guessed | right | tokens/s | with guesses | ratio | of turns: least, middle, most |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let copying = COPYING.map(|(name, task)| {
        let passage = match name {
            "corrected" => PASSAGE.replace("every", "evry").replace("winter", "wintr"),
            _ => PASSAGE.to_string(),
        };
        (name, format!("{task}\n\n{passage}"))
    });
    let writing = WRITING.map(|(name, task)| (name, task.to_string()));
    for (name, text) in copying.into_iter().chain(writing) {
        let prompt = Prompt::chat(&[Message::user(&text)]);
        let plain = GenerationConfig::default().max_tokens(MAX_TOKENS);
        let plain = plain.eos_ids(eos_ids.iter().copied());
        let ahead = plain.clone().speculate(PromptLookup::default());
        let (mut best, mut ratios) = ([f64::MAX; 2], Vec::new());
        let (mut tokens, mut fared) = (0, Speculated::default());
        for turn in 0..=TURNS {
            let (expected, without) = answer(model, &prompt, &plain, cpu)?;
            let (got, with) = answer(model, &prompt, &ahead, cpu)?;
            assert_eq!(got.ids, expected.ids, "{name}");
            tokens = got.ids.len();
            fared = got.speculated.unwrap_or_default();
            if turn > 0 {
                best = [best[0].min(without), best[1].min(with)];
                ratios.push(without / with);
            }
        }
        let ratios = sorted(ratios);
        println!(
            "| {name} | {tokens} | {} | {} | {:.1} | {:.1} | {:.2} | {:.2} {:.2} {:.2} |",
            fared.drafted,
            fared.accepted,
            tokens as f64 / best[0],
            tokens as f64 / best[1],
            best[0] / best[1],
            ratios[0],
            median(&ratios),
            ratios[ratios.len() - 1],
        );
    }
    Ok(())
}

/// An answer, and the seconds after its prompt.
fn answer(
    model: &HybridModel,
    prompt: &Prompt,
    config: &GenerationConfig,
    cpu: bool,
) -> Result<(Answer, f64)> {
    let mut stream = model.stream(prompt.clone(), config)?;
    stream.read_prompt()?;
    seconds(cpu, || Ok(stream.collect_answer()?))
}
