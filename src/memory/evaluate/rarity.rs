//! Rare words, by counting them.

use std::collections::{BTreeMap, HashMap, HashSet};

use unicode_segmentation::UnicodeSegmentation;

use super::Read;

/// In how few texts a word is.
pub(super) struct Rarity {
    texts: usize,
    /// In how many of them each word is.
    counts: HashMap<String, usize>,
}

impl Rarity {
    pub(super) fn of<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let mut rarity = Self { texts: 0, counts: HashMap::new() };
        for text in texts {
            rarity.texts += 1;
            for word in lower(text).into_iter().collect::<HashSet<_>>() {
                *rarity.counts.entry(word).or_default() += 1;
            }
        }
        rarity
    }

    /// `ln((1 + texts) / (1 + those with the word)) + 1`
    fn idf(&self, word: &str) -> f64 {
        let with = self.counts.get(word).copied().unwrap_or(0);
        ((1.0 + self.texts as f64) / (1.0 + with as f64)).ln() + 1.0
    }

    /// Of each token, that of the word that it spells; of no word, 0.
    pub(super) fn scores(&self, read: &Read<'_>) -> Vec<f32> {
        let mut scores = vec![0.0; read.ids.len()];
        for word in read.words() {
            let text = read.text.get(word.bytes).unwrap_or_default();
            let idf = self.idf(&text.to_lowercase()) as f32;
            scores.get_mut(word.tokens).into_iter().flatten().for_each(|score| *score = idf);
        }
        scores
    }

    /// How often each word is there, times its idf; of length 1.
    pub(super) fn vector(&self, text: &str) -> BTreeMap<String, f64> {
        let mut vector: BTreeMap<String, f64> = BTreeMap::new();
        for word in lower(text) {
            let idf = self.idf(&word);
            *vector.entry(word).or_default() += idf;
        }
        let length = vector.values().map(|value| value * value).sum::<f64>().sqrt();
        vector.values_mut().for_each(|value| *value /= length.max(f64::MIN_POSITIVE));
        vector
    }
}

fn lower(text: &str) -> Vec<String> {
    text.unicode_words().map(str::to_lowercase).collect()
}
