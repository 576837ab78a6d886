//! Prints stories told over several conversations, for `hybrid memory eval --what conversations`: a JSON object a line.
//!
//! ```text
//! cargo run -p flashback-suite --bin conversations -- 50 1 > stories.jsonl     # how many, and the seed
//! ```

#![allow(clippy::print_stdout)]

use std::error::Error;

use flashback_suite::Conversations;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |otherwise| arguments.next().map_or(Ok(otherwise), |it| it.parse::<u64>());
    let (stories, seed) = (number(50)?, number(1)?);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for _ in 0..stories {
        println!("{}", serde_json::to_string(&Conversations::draw(&mut rng))?);
    }
    Ok(())
}
