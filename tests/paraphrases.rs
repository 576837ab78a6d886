//! Which way of embedding makes paraphrases neighbours, with weights that were never taught to see both ways.

use std::error::Error;

use candle_core::{Device, Tensor};
use hybrid_attention::{EmbedConfig, HybridModel, Pooling, Sight};
use hybrid_attention_testing::smollm2;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const PAIRS: [[&str; 2]; 20] = [
    [
        "The train to Lyon was cancelled because of the snow.",
        "Snow meant that no train ran to Lyon.",
    ],
    [
        "She repaired the old clock with parts she had made herself.",
        "Using home-made parts, she got the old clock working again.",
    ],
    [
        "The company will close its factory in Leeds next year.",
        "Next year the firm's plant in Leeds is to be shut.",
    ],
    [
        "Nobody knows who painted the picture in the church.",
        "The painter of the church's picture is unknown.",
    ],
    [
        "He drinks three cups of coffee before breakfast.",
        "Before he eats in the morning he has coffee three times.",
    ],
    [
        "The bridge was built in less than two years.",
        "It took under two years to construct the bridge.",
    ],
    [
        "Our neighbour's dog barks whenever it rains.",
        "Every time it rains, the dog next door starts barking.",
    ],
    [
        "The price of bread has doubled since January.",
        "Bread now costs twice what it did in January.",
    ],
    [
        "They postponed the wedding until the spring.",
        "The marriage has been put off to springtime.",
    ],
    ["The lake freezes over in most winters.", "In most winters there is ice all over the lake."],
    [
        "The boy learned to swim before he could walk.",
        "Swimming came to the boy earlier than walking.",
    ],
    [
        "A thief stole two bicycles from the school.",
        "Two bikes were taken from the school by a burglar.",
    ],
    [
        "The doctor told him to sleep more and work less.",
        "More sleep and less work, his physician advised.",
    ],
    [
        "Whales breathe air although they live in water.",
        "Though their home is the sea, whales need air.",
    ],
    [
        "The novel was translated into thirty languages.",
        "There are versions of the novel in thirty tongues.",
    ],
    [
        "We could not see the stars for the lights of the city.",
        "City lights kept the stars out of our sight.",
    ],
    [
        "The goalkeeper saved a penalty in the last minute.",
        "In the final minute a penalty was stopped by the keeper.",
    ],
    [
        "Her grandfather emigrated to Canada in 1911.",
        "It was in 1911 that her mother's father left for Canada.",
    ],
    [
        "The new law forbids smoking in restaurants.",
        "Restaurants must be smoke-free under the new act.",
    ],
    [
        "The old oak fell in last night's storm.",
        "A storm brought down the ancient oak during the night.",
    ],
];

/// Of how many texts the nearest other one is its paraphrase.
fn found(vectors: &Tensor) -> Result<usize> {
    let cosine = vectors.matmul(&vectors.t()?)?.to_vec2::<f32>()?;
    let nearest = |text: usize| {
        let others = (0..cosine.len()).filter(|other| *other != text);
        others.max_by(|a, b| cosine[text][*a].total_cmp(&cosine[text][*b]))
    };
    Ok((0..cosine.len()).filter(|text| nearest(*text) == Some(text ^ 1)).count())
}

/// The figures that the docs of `EmbedConfig` show.
#[test]
#[allow(clippy::print_stdout, reason = "the figures")]
fn causal_reading_is_the_better_default() -> Result {
    let Some(path) = smollm2() else { return Ok(()) };
    let model = HybridModel::from_gguf(path, None, &Device::Cpu)?;
    let texts: Vec<&str> = PAIRS.iter().flatten().copied().collect();
    let find = |config: EmbedConfig| found(&model.embed(&texts, &config)?);
    let default = find(EmbedConfig::default())?;
    let both_ways = find(EmbedConfig::default().sight(Sight::Bidirectional))?;
    let causal_mean = find(EmbedConfig::default().pooling(Pooling::Mean))?;
    println!(
        "of 40: {default} by default, {causal_mean} causal with a plain mean, {both_ways} both ways"
    );
    assert!(default >= 25 && 2 * both_ways < default, "{default} and {both_ways} of 40");
    Ok(())
}
