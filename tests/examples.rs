//! The examples, run as a person would run them. `cargo test` builds them; `cargo test --test examples`
//! alone needs `cargo build --examples` before it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flashback_suite::{Plan, Split, Story};
use hybrid_attention_testing::{Result, checkpoint};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// `cargo test` builds the examples into `examples/`, beside the `deps/` that this test is in.
fn example(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let profile = test.parent().and_then(Path::parent).ok_or("no folder of the profile")?;
    let path = profile.join("examples").join(name).with_extension(std::env::consts::EXE_EXTENSION);
    match path.is_file() {
        true => Ok(path),
        false => Err(format!("{} is missing: cargo build --examples", path.display()).into()),
    }
}

fn run(name: &str, args: &[&str], stdin: &str) -> Result<Output> {
    hybrid_attention_testing::run(Command::new(example(name)?).args(args), stdin)
}

/// Standard output of a run that succeeds.
fn succeed(name: &str, args: &[&str], stdin: &str) -> Result<String> {
    let output = run(name, args, stdin)?;
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn think_follows_one_story_and_examines_others() -> Result {
    let (hops, seed, passes) = (3, 5, 4);
    let args = [hops, seed, 2].map(|number| number.to_string());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let text = succeed("think", &args, "")?;
    assert_eq!(text, succeed("think", &args, "")?, "the seed decides everything");
    let mut rng = ChaCha8Rng::seed_from_u64(seed as u64);
    let story = Story::draw(&Plan::examination(Split::Test, hops), &mut rng);
    let question = story.question_of(hops).ok_or("no question")?;
    let in_one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let told = in_one_line(&format!("{}{}", story.text(), story.ask(question)));
    assert!(in_one_line(&text).contains(&told), "{text}");
    assert!(text.contains(&format!("Right is {}, 3 of 20 facts away.", question.answer)), "{text}");
    for passes in 0..=passes {
        let line = text.lines().find(|line| line.starts_with(&format!("     {passes}  ")));
        let marks = line.ok_or("no such pass")?.chars().filter(|c| ['✓', '·'].contains(c)).count();
        assert_eq!(marks, hops, "{text}");
    }
    for length in [1, 2, 4, 6, 8, 10, 12] {
        let row = text.lines().find(|line| line.starts_with(&format!("{length:>5}   ")));
        let shares = row.ok_or("no such length")?.split_whitespace().skip(1);
        let shares = shares.map(str::parse).collect::<std::result::Result<Vec<f64>, _>>()?;
        assert_eq!(shares.len(), passes + 1 + 1, "the numbers of passes and a guess: {text}");
        assert!(shares.iter().all(|share| (0.0..=100.0).contains(share)), "{text}");
    }
    Ok(())
}

#[test]
fn think_names_the_problem() -> Result {
    for (args, message) in [
        (["0"], "expected 1 to 12 facts, got 0"),
        (["1000000000"], "expected 1 to 12 facts"),
        (["many"], "InvalidDigit"),
    ] {
        let output = run("think", &args, "")?;
        let stderr = String::from_utf8(output.stderr)?;
        assert!(!output.status.success() && output.stdout.is_empty(), "{args:?}");
        assert!(stderr.contains(message), "{args:?}: {stderr}");
    }
    Ok(())
}

#[test]
fn the_others_do_what_they_say() -> Result {
    let answers = succeed("generate", &[], "")?;
    let answers: Vec<&str> = answers.lines().collect();
    assert!(answers.len() == 2 && answers[0].contains("after 0 thought passes"), "{answers:?}");
    assert!(answers[0].trim_start().starts_with("chest "), "a nearer link: {answers:?}");
    assert!(answers[1].trim_start().starts_with("jar "), "{answers:?}");

    let cosines = succeed("embed", &[], "")?;
    let cosines = cosines.lines().map(|line| line.split(' ').next().unwrap_or_default().parse());
    let cosines = cosines.collect::<std::result::Result<Vec<f32>, _>>()?;
    assert!(cosines[0] == 1.0 && cosines[1] > cosines[2], "{cosines:?}");

    let refined = succeed("refine_op", &[], "")?;
    assert!(refined.starts_with("Max, after drifts of ["), "{refined}");
    let paths = succeed("transition", &[], "")?;
    let nats = |says: &str| -> Result<f64> {
        let line = paths.lines().find(|line| line.contains(says)).ok_or("no such line")?;
        Ok(line.split(' ').next().unwrap_or_default().parse()?)
    };
    let (closer, gated) = (nats("the closer of the two")?, nats("that the gate chooses")?);
    assert!(closer <= gated && closer <= nats("in other stories")?, "{paths}");
    let by_hand = succeed("by_hand", &[], "")?; // it compares itself with `generate`
    assert!(by_hand.starts_with("by hand:  [") && by_hand.contains("\ngenerate: ["), "{by_hand}");
    Ok(())
}

#[test]
fn chat_keeps_what_was_read() -> Result {
    let folder = checkpoint(1.0, true)?;
    let path = folder.path().to_str().ok_or("no text")?;
    let turns = succeed("chat", &[path], "the cat\nthe dog\n")?;
    let known: Vec<_> =
        turns.split(" tokens known]").filter_map(|it| it.rsplit('[').next()).collect();
    assert!(known.len() == 3 && known[0].starts_with("0 of "), "{turns}");
    assert!(!known[1].starts_with("0 of "), "the second turn knows the first: {turns}");
    assert!(!run("chat", &[], "")?.status.success());
    Ok(())
}

#[test]
fn memory_finds_marks_and_answers() -> Result {
    let plain = |text: String| text.replace("\x1b[1m", "").replace("\x1b[0m", "");
    let own = succeed("memory", &[], "")?;
    assert!(own.contains("\x1b[1m") && own.contains("a note: "), "{own}");
    let own = plain(own);
    assert!(own.contains("By then, the kettle was put in the crate."), "{own}");
    assert!(own.contains("Where is the ball?\nIn the …"), "{own}");

    let (folder, notes) = (checkpoint(1.0, true)?, tempfile::tempdir()?);
    let texts = [("a.txt", "the cat sat on the mat"), ("b.txt", "the dog sat about in the sun")];
    for (name, text) in texts {
        std::fs::write(notes.path().join(name), text)?;
    }
    let path = folder.path().to_str().ok_or("no text")?;
    let notes = notes.path().to_str().ok_or("no text")?;
    let found = plain(succeed("memory", &[path, notes, "where is the cat?"], "")?);
    for (name, text) in texts {
        assert!(found.contains(&format!(" {name}: {text}\n")), "{found}");
    }
    assert!(!run("memory", &[path], "")?.status.success());
    assert!(!run("memory", &[path, "no such folder", "why?"], "")?.status.success());
    Ok(())
}
