//! Many prompts, a few threads: each thread has a handle of its own, and all share the weights. For answers
//! side by side in one pass, which is faster on most machines, see `HybridModel::generate_many`.

#![allow(clippy::print_stdout, reason = "a program")]

use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use hybrid_attention::candle_core::Device;
use hybrid_attention::{GenerationConfig, HybridModel, Result};

fn main() -> Result<()> {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let config = GenerationConfig::default().max_tokens(3);
    let (jobs, waiting) = mpsc::channel();
    let (done, answers) = mpsc::channel();
    let waiting = Arc::new(Mutex::new(waiting));

    let workers = (0..2).map(|_| {
        let (model, config) = (model.clone(), config.clone());
        let (waiting, done) = (Arc::clone(&waiting), done.clone());
        thread::spawn(move || {
            loop {
                let job = waiting.lock().map(|waiting| waiting.recv());
                let Ok(Ok((index, prompt))) = job else { return };
                let answer = model.generate(prompt, &config);
                if done.send((index, answer)).is_err() {
                    return;
                }
            }
        })
    });
    let workers: Vec<_> = workers.collect();
    drop(done);
    for job in ["The coin is in the jar.", "Leo gave everything to Ida.", "The urn is in the sled."]
        .into_iter()
        .enumerate()
    {
        jobs.send(job).ok();
    }
    drop(jobs); // no more prompts: the threads end

    for (index, answer) in answers {
        println!("{index}: {:?}", answer?.text);
    }
    workers.into_iter().for_each(|worker| drop(worker.join()));
    Ok(())
}
