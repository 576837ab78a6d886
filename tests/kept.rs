//! Documents that a memory keeps in files: what is recalled is what reading it now would be.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use hybrid_attention::memory::{
    Embedding, Keep, Memory, Note, NoteId, Recall, Salience, Store, Volatile,
};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::{
    Answer, Config, EmbedConfig, Error, GenerationConfig, HandOff, HybridModel, Prompt, Sight,
    Thinking, Tokenizer,
};

use common::{Result, fixture, logged, tiny};

const TEXTS: [&str; 3] = [
    "the cat sat on the mat and looked at the sea for a long time before it slept",
    "a boat came in from the north with barrels of salt, and nobody knew who had sent it",
    "the red door of the old house by the harbour was never locked while she lived there",
];
const QUESTION: &str =
    "who had sent the boat with the barrels of salt that came in from the north?";

fn model(seed: u64) -> Result<HybridModel> {
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join("llama"))?;
    let config = Config { vocab_size: 512, ..tiny::config() };
    Ok(HybridModel::new(tiny::transformer(&config, seed)?, tokenizer)?)
}

fn thinking() -> Thinking {
    Thinking::new(2).refine(Interpolate::new(0.3)).hand_off(HandOff::KeyValue)
}

fn memory(model: &HybridModel) -> Result<Memory> {
    Ok(Memory::over(Volatile::default(), model, None)?)
}

fn keeping(model: &HybridModel, folder: &Path) -> Result<Memory> {
    Ok(memory(model)?.keep_in(folder, Keep::from(thinking()))?)
}

fn remember(memory: &Memory, texts: &[&str]) -> Result<Vec<NoteId>> {
    Ok(memory.remember_all(texts.iter().map(|text| (text, Note::default().time(0))))?)
}

fn path(folder: &Path, id: NoteId) -> PathBuf {
    folder.join(format!("{id}.safetensors"))
}

/// Files of documents in a folder.
fn files(folder: &Path) -> Result<usize> {
    let names = fs::read_dir(folder)?.map(|it| Ok(it?.file_name().to_string_lossy().into_owned()));
    let names = names.collect::<Result<Vec<String>>>()?;
    assert!(names.iter().all(|it| it == "kept.json" || it.ends_with(".safetensors")), "{names:?}");
    Ok(names.iter().filter(|it| it.ends_with(".safetensors")).count())
}

fn refused<T>(result: hybrid_attention::Result<T>, expected: &str) -> Result<Error> {
    let error = result.err().ok_or(format!("accepted: {expected}"))?;
    assert!(error.to_string().contains(expected), "{error} says nothing of {expected:?}");
    Ok(error)
}

fn assert_same(got: &Answer, expected: &Answer) {
    let bits = |answer: &Answer| answer.logprobs.iter().map(|it| it.to_bits()).collect::<Vec<_>>();
    assert_eq!((&got.prompt_ids, &got.ids), (&expected.prompt_ids, &expected.ids));
    assert_eq!(bits(got), bits(expected));
}

#[test]
fn one_document_recalled_is_thinking_about_it_now() -> Result {
    for dtype in [DType::F32, DType::BF16] {
        let model = model(1)?.with_cache_dtype(dtype)?;
        for thinking in [thinking(), thinking().hand_off(HandOff::Refined), Thinking::none()] {
            let folder = tempfile::tempdir()?;
            let (now, once) = (memory(&model)?, memory(&model)?);
            let once = once.keep_in(folder.path(), Keep::Thought(thinking.clone()))?;
            for memory in [&now, &once] {
                remember(memory, &TEXTS[1..2])?;
            }
            let config = GenerationConfig::default().thinking(thinking).max_tokens(5);
            let recall = Recall::best(1);
            let expected = model.generate(now.prompt(QUESTION, &recall)?, &config)?;
            let mut stream = model.stream(once.prompt(QUESTION, &recall)?, &config)?;
            let kept = stream.read_prompt()?;
            assert_same(&stream.collect_answer()?, &expected);
            let id = NoteId::of(TEXTS[1]);
            let document = once.document(id)?.ok_or("none")?;
            assert_eq!((kept, document.lead()), (document.ids().len(), 1));
            assert_eq!(document.kept().dtype(), dtype);
            assert!(once.is_kept(id) && !now.is_kept(id) && now.keeps().is_none());
            assert!(matches!(once.keeps(), Some(Keep::Thought(_))));
        }
    }
    Ok(())
}

/// Whatever the store, a file for each note, read and written once, gone with it.
#[test]
fn a_note_has_a_file_as_long_as_it_can_be_recalled() -> Result {
    let (model, root) = (model(1)?, tempfile::tempdir()?);
    let over = |name: &str, store: Box<dyn Store>| -> Result {
        let folder = root.path().join(name).join("kept");
        let memory = Memory::over(store, &model, None)?.keep_in(&folder, Keep::from(thinking()))?;
        let ids = remember(&memory, &TEXTS)?;
        assert_eq!(files(&folder)?, 3);
        let written =
            || ids.iter().map(|id| fingerprint(&path(&folder, *id))).collect::<Result<Vec<_>>>();
        let before = written()?;
        let prompt = memory.prompt(QUESTION, &Recall::best(3))?;
        remember(&memory, &TEXTS)?;
        assert_eq!((written()?, files(&folder)?), (before, 3), "{name}");
        assert_eq!(memory.prompt(QUESTION, &Recall::best(3))?, prompt);

        // What is never recalled needs none; what is remembered again does.
        let new = memory.supersede(ids[0], "the dog sat on the mat", Note::default())?;
        assert!(!memory.is_kept(ids[0]) && memory.is_kept(new), "{name}");
        memory.remember(TEXTS[0], Note::default())?;
        assert!(memory.is_kept(ids[0]));
        for id in ids.iter().chain([&new]) {
            assert!(memory.forget(*id)? && !memory.forget(*id)?);
        }
        assert_eq!(files(&folder)?, 0);

        // A text that is refused leaves nothing of those before it.
        refused(
            memory.remember_all([(TEXTS[0], Note::default()), (" ", Note::default())]),
            "text 1",
        )?;
        refused(memory.supersede(new, TEXTS[0], Note::default()), "that is there")?;
        assert_eq!((files(&folder)?, memory.len()?), (0, 0));
        Ok(())
    };
    over("volatile", Box::<Volatile>::default())?;
    #[cfg(feature = "redb")]
    over(
        "embedded",
        Box::new(hybrid_attention::memory::Embedded::open(root.path().join("notes.redb"))?),
    )?;
    #[cfg(feature = "pgvector")]
    if let Some(schema) = common::server::Schema::empty()? {
        over("postgres", Box::new(hybrid_attention::memory::Postgres::connect(&schema.to())?))?;
    }
    Ok(())
}

/// What changes when a file is written anew.
fn fingerprint(path: &Path) -> Result<(u64, std::time::SystemTime)> {
    let metadata = fs::metadata(path)?;
    #[cfg(unix)]
    let number = std::os::unix::fs::MetadataExt::ino(&metadata);
    #[cfg(not(unix))]
    let number = 0;
    Ok((number, metadata.modified()?))
}

#[cfg(feature = "redb")]
#[test]
fn a_store_in_a_file_has_its_folder_beside_it() -> Result {
    let (model, root) = (model(1)?, tempfile::tempdir()?);
    let path = root.path().join("notes.redb");
    let plain = Memory::open(&path, &model)?;
    assert!(!plain.has_kept());
    refused(plain.clone().keep(None), "kept.json")?;
    let memory = plain.keep(Keep::from(thinking()))?;
    let ids = remember(&memory, &TEXTS)?;
    assert!(memory.has_kept());
    let folder = root.path().join("notes.redb.kept");
    assert_eq!(files(&folder)?, 3);
    let right = memory.prompt(QUESTION, &Recall::best(2))?;
    drop(memory);
    // As it was kept, whoever asks.
    let again = Memory::open(&path, &model)?.keep(None)?;
    assert_eq!(again.prompt(QUESTION, &Recall::best(2))?, right);
    drop(again);
    // A memory that keeps nothing forgets all the same.
    let plain = Memory::open(&path, &model)?;
    assert!(plain.forget(ids[0])?);
    assert_eq!(files(&folder)?, 2);
    refused(plain.document(ids[1]), "keeps documents")?;
    refused(memory_without_folder(&model)?.keep(None), "Memory::keep_in")?;
    Ok(())
}

#[cfg(feature = "redb")]
fn memory_without_folder(model: &HybridModel) -> Result<Memory> {
    memory(model)
}

#[test]
fn what_is_not_kept_is_read_now() -> Result {
    let (model, folder) = (model(1)?, tempfile::tempdir()?);
    let memory = keeping(&model, folder.path())?;
    let ids = remember(&memory, &TEXTS)?;
    let recall = Recall::best(3);
    let right = memory.prompt(QUESTION, &recall)?;
    fs::remove_file(path(folder.path(), ids[1]))?;
    let again = || keeping_again(&memory, folder.path())?.prompt(QUESTION, &recall);
    let log = logged(|| {
        assert_eq!(again()?, right);
        Ok(())
    })?;
    assert_eq!(log.len(), 1, "{log:?}");
    assert!(log[0].starts_with("WARN") && log[0].contains(&ids[1].to_string()), "{log:?}");
    assert_eq!(files(folder.path())?, 2);
    // Remembering is what keeps.
    memory.remember(TEXTS[1], Note::default())?;
    let log = logged(|| {
        assert_eq!(again()?, right);
        Ok(())
    })?;
    assert!(log.is_empty(), "{log:?}");

    // An import keeps nothing, and an export says nothing of it.
    let mut lines = Vec::new();
    memory.export(&mut lines)?;
    let other = tempfile::tempdir()?;
    let imported = keeping(&model, other.path())?;
    assert_eq!((imported.import(&mut lines.as_slice())?, files(other.path())?), (3, 0));
    assert_eq!(imported.prompt(QUESTION, &recall)?, right);
    assert_eq!(memory.document(NoteId::of("none"))?, None);
    Ok(())
}

/// The same memory with nothing in hand that it has read before.
fn keeping_again(memory: &Memory, folder: &Path) -> hybrid_attention::Result<Memory> {
    memory.clone().keep_in(folder, Keep::from(thinking()))
}

/// At any byte a file may end or be another.
#[test]
fn a_damaged_file_is_an_error_that_names_it() -> Result {
    let (model, folder) = (model(1)?, tempfile::tempdir()?);
    let memory = keeping(&model, folder.path())?;
    let ids = remember(&memory, &TEXTS[..1])?;
    let path = path(folder.path(), ids[0]);
    let (whole, right) = (fs::read(&path)?, memory.prompt(QUESTION, &Recall::best(1))?);
    let header = usize::try_from(u64::from_le_bytes(whole[..8].try_into()?))? + 8;
    let ask = || keeping_again(&memory, folder.path())?.prompt(QUESTION, &Recall::best(1));
    let check = |content: &[u8], harmless: bool| -> Result {
        fs::write(&path, content)?;
        match ask() {
            // Of the header, not all is used.
            Ok(prompt) => assert!(harmless && prompt == right),
            Err(error) => {
                assert!(
                    matches!(error, Error::Malformed { .. } | Error::Store { .. }),
                    "{error:?}"
                );
                assert!(error.to_string().contains(&path.display().to_string()), "{error}");
            }
        }
        Ok(())
    };
    let ends = (0..header + 4).step_by(7).chain((header..whole.len()).step_by(997));
    for end in ends.chain([whole.len() - 1]) {
        check(&whole[..end], false)?;
    }
    for at in
        (0..header).step_by(3).chain((header..whole.len()).step_by(1499)).chain([whole.len() - 1])
    {
        let mut wrong = whole.clone();
        wrong[at] ^= 4;
        check(&wrong, at < header)?;
    }
    check(&[&whole[..], b"more"].concat(), false)?;
    check(b"version https://git-lfs.github.com/spec/v1", false)?;
    // Neither is it read anew in silence when the text is remembered again.
    let error = memory.clone().keep_in(folder.path(), None)?.remember(TEXTS[0], Note::default());
    refused(error, &path.display().to_string())?;
    fs::write(&path, &whole)?;
    assert_eq!(ask()?, right);
    Ok(())
}

#[test]
fn another_models_or_other_settings_documents_are_refused() -> Result {
    let (model, folder) = (model(1)?, tempfile::tempdir()?);
    let memory = keeping(&model, folder.path())?;
    let ids = remember(&memory, &TEXTS)?;
    let keep = |model: &HybridModel, keep: Option<Keep>| {
        Memory::over(Volatile::default(), model, None)?.keep_in(folder.path(), keep)
    };
    // What changes no key and no value is no other setting.
    let same = thinking().detail(hybrid_attention::Detail::Tokens).gradient_passes(1);
    keep(&model, Some(Keep::Thought(same)))?;
    keep(&model.with_cache_dtype(DType::BF16)?, None)?;
    let place = folder.path().display().to_string();
    for (model, how, expected) in [
        (self::model(2)?, None, "another model"),
        (model.clone(), Some(Keep::Thought(thinking().span(..2))), "were read by"),
        (model.clone(), Some(Keep::Thought(Thinking::none())), "were read by"),
        (model.clone(), Some(Keep::Embedded), "were read by"),
    ] {
        let error = refused(keep(&model, how), expected)?;
        assert!(matches!(error, Error::Store { .. }) && error.to_string().contains(&place));
    }
    for (thinking, expected) in [
        (thinking().rethink_every(4), "rethink_every"),
        (thinking().refine_fn(|xs, _| Ok(xs.clone())), "JSON"),
        (thinking().span(..99), "span"),
    ] {
        let other = tempfile::tempdir()?;
        let keep = self::memory(&model)?.keep_in(other.path().join("new"), Keep::from(thinking));
        refused(keep, expected)?;
        assert!(!other.path().join("new").exists());
    }

    // One file in the place of another, and one from another folder.
    let ask = || keeping_again(&memory, folder.path())?.prompt(QUESTION, &Recall::best(3));
    let first = path(folder.path(), ids[0]);
    let whole = fs::read(&first)?;
    fs::copy(path(folder.path(), ids[1]), &first)?;
    refused(ask(), &format!("{}: the document of note", first.display()))?;
    let other = tempfile::tempdir()?;
    let elsewhere = self::memory(&model)?.keep_in(other.path(), Keep::from(Thinking::none()))?;
    remember(&elsewhere, &TEXTS[..1])?;
    fs::copy(path(other.path(), ids[0]), &first)?;
    let error = refused(ask(), &first.display().to_string())?;
    assert!(matches!(error, Error::Store { .. }), "{error:?}");
    fs::write(&first, whole)?;
    ask()?;

    // A folder that says nothing, or more than a stranger may ask for.
    let manifest = folder.path().join("kept.json");
    let right = fs::read_to_string(&manifest)?;
    for (text, expected) in [
        ("{".to_owned(), "EOF"),
        (right.replace("\"format\":1", "\"format\":2"), "format 2"),
        (right.replace("\"passes\":2", "\"passes\":1000"), "thinking"),
        (right.replace("\"passes\":2", "\"passes\":1000000"), "passes"),
        (right.replace("thought", "guessed"), "guessed"),
        (right.replace("\"passes\":2", "\"passes\":3"), "were read by"),
    ] {
        fs::write(&manifest, text)?;
        let error = refused(keep(&model, Some(Keep::from(thinking()))), expected)?;
        assert!(error.to_string().contains(&place), "{error}");
    }
    fs::write(&manifest, right)?;
    keep(&model, None)?;
    Ok(())
}

/// Documents take the place of the same notes, as many as fit.
#[test]
fn budgets_are_kept_and_nothing_may_be_found() -> Result {
    let (model, folder) = (model(1)?, tempfile::tempdir()?);
    let (now, once) = (memory(&model)?, keeping(&model, folder.path())?);
    let config = GenerationConfig::default().max_tokens(1);
    let ids = |prompt: Prompt| Ok::<_, Error>(model.generate(prompt, &config)?.prompt_ids);
    let both = |recall: &Recall| -> Result<Vec<u32>> {
        let (now, once) = (now.prompt(QUESTION, recall)?, once.prompt(QUESTION, recall)?);
        let (now, once) = (ids(now)?, ids(once)?);
        assert_eq!(now, once);
        Ok(once)
    };
    let nothing = both(&Recall::best(3))?;
    for memory in [&now, &once] {
        remember(memory, &TEXTS)?;
    }
    assert_eq!(both(&Recall::best(3).tokens(0))?, nothing);
    assert_eq!(both(&Recall::best(3).min_score(2.0))?, nothing);
    let all = both(&Recall::best(3))?;
    for room in (0..200).step_by(13) {
        let some = both(&Recall::best(3).tokens(room))?;
        assert!(some.len() <= nothing.len() + room && some.len() <= all.len());
    }
    // The end of each document but the first runs again.
    let found = once.recall(QUESTION, &Recall::best(3))?;
    let recall = Recall::best(3).recompute(5);
    let documents = found.iter().rev().map(|it| Ok(once.document(it.id)?.ok_or("gone")?));
    let documents = documents.collect::<Result<Vec<_>>>()?;
    let begun = Prompt::default().document(&documents[0]);
    let add = |prompt: Prompt, it| prompt.document_recomputed(it, 5);
    let prompt = documents[1..].iter().fold(begun, add);
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let prompt = prompt.plain_ids(&tokenizer.encode_said(QUESTION)?);
    assert_eq!(once.prompt(QUESTION, &recall)?, prompt);
    assert_ne!(once.prompt(QUESTION, &Recall::best(3))?, prompt);
    assert_eq!(ids(prompt)?, all);

    // More than the model can read at once.
    let short = Config { vocab_size: 512, max_position_embeddings: 100, ..tiny::config() };
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join("llama"))?;
    let short = HybridModel::new(tiny::transformer(&short, 1)?, tokenizer)?;
    let other = tempfile::tempdir()?;
    let memory = keeping(&short, other.path())?;
    remember(&memory, &TEXTS)?;
    let prompt = memory.prompt(QUESTION, &Recall::best(3))?;
    assert!(matches!(short.generate(prompt, &config), Err(Error::ContextFull { .. })));
    let long = TEXTS.join(" ").repeat(3);
    assert!(matches!(memory.remember(&long, Note::default()), Err(Error::ContextFull { .. })));
    assert_eq!((memory.len()?, files(other.path())?), (3, 3));
    Ok(())
}

#[test]
fn threads_add_and_recall_at_once() -> Result {
    let (model, folder) = (model(1)?, tempfile::tempdir()?);
    let memory = keeping(&model, folder.path())?;
    remember(&memory, &TEXTS)?;
    let right = memory.prompt(QUESTION, &Recall::best(3).tag("of", "all"))?;
    let work = |thread: usize| -> hybrid_attention::Result<()> {
        for round in 0..6 {
            let text =
                format!("note {round} of all threads, each of which adds it and forgets one");
            memory.remember(&text, Note::default())?;
            memory.prompt(QUESTION, &Recall::best(2))?;
            let own = format!("note {round} of thread {thread}");
            memory.forget(memory.remember(&own, Note::default())?)?;
            assert_eq!(memory.prompt(QUESTION, &Recall::best(3).tag("of", "all"))?, right);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads = [0, 1, 2].map(|thread| scope.spawn(move || work(thread)));
        threads.into_iter().try_for_each(|it| {
            Ok::<_, Box<dyn std::error::Error>>(it.join().map_err(|_| "panicked")??)
        })
    })?;
    assert_eq!((memory.len()?, files(folder.path())?), (9, 9));
    // More than stay mapped.
    let many: Vec<String> = (0..70).map(|it| format!("number {it}")).collect();
    remember(&memory, &many.iter().map(String::as_str).collect::<Vec<_>>())?;
    let recall = Recall::best(79).tokens(10_000);
    assert_eq!(memory.prompt("number", &recall)?, memory.prompt("number", &recall)?);
    Ok(())
}

/// A checkpoint laid out as GritLM's, and how it embeds documents.
fn gritlm() -> Result<(HybridModel, EmbedConfig)> {
    let folder = fixture("cases").join("plain");
    let model = HybridModel::from_folder(folder, None, &Device::Cpu)?;
    Ok((model, EmbedConfig::default().sight(Sight::Bidirectional).instruction("<|embed|>\n")))
}

#[test]
fn one_run_gives_the_vector_and_what_is_kept() -> Result {
    let (model, embed) = gritlm()?;
    // As `gritlm.py` computes it.
    let (vector, _) = model.embed_document("the cat sat on the mat", &embed)?;
    for (got, right) in vector.iter().zip([-0.03277f32, 0.13196, -0.09327, -0.04872, 0.14632]) {
        assert!((got - right).abs() < 1.5e-5, "{got}, not {right}");
    }
    let pass = Thinking::new(1).refine(Interpolate::new(0.0)).hand_off(HandOff::KeyValue);
    for dtype in [DType::F32, DType::F16] {
        let model = model.with_cache_dtype(dtype)?;
        for text in TEXTS {
            let (vector, document) = model.embed_document(text, &embed)?;
            assert_eq!(model.embed(&[text], &embed)?.to_vec2::<f32>()?, [vector]);
            let wide =
                pass.on(model.thought_model())?.read_document(document.ids(), 0, DType::F32)?;
            let (got, right) = (document.kept(), wide.kept());
            match dtype {
                DType::F32 => assert!(got == right),
                _ => assert_eq!(got.bytes().len() * 2, right.bytes().len()),
            }
            let lead = model.tokenizer().ok_or("none")?.encode("<|embed|>\n", true)?;
            assert_eq!(document.ids()[..document.lead()], lead);
        }
    }
    // The same numbers as a prompt of which instruction and document are context.
    let (_, document) = model.embed_document(TEXTS[1], &embed)?;
    let question = model.tokenizer().ok_or("none")?.encode(QUESTION, false)?;
    let config = GenerationConfig::default().max_tokens(4);
    let now = Prompt::default().context_ids(document.ids()).plain_ids(&question);
    let expected = model.generate(now, &config.clone().thinking(pass))?;
    let once = Prompt::default().document(&document).plain_ids(&question);
    assert_same(&model.generate(once, &config)?, &expected);

    refused(model.embed_document(TEXTS[0], &embed.clone().max_tokens(20)), "kept text")?;
    refused(model.embed_document("", &embed), "empty")?;
    refused(model.embed_document("a", &embed.clone().thinking(Thinking::new(1))), "thinking")?;
    Ok(())
}

#[test]
fn a_memory_of_a_model_that_embeds_and_answers_reads_once() -> Result {
    let ((model, embed), folder) = (gritlm()?, tempfile::tempdir()?);
    let over = |embedding| Memory::over(Volatile::default(), &model, Some(embedding));
    let memory = || over(Embedding::Whole(embed.clone()));
    let (plain, once) = (memory()?, memory()?.keep_in(folder.path(), Keep::Embedded)?);
    for memory in [&plain, &once] {
        remember(memory, &TEXTS)?;
    }
    let recall = Recall::best(2);
    assert_eq!(once.recall(QUESTION, &recall)?, plain.recall(QUESTION, &recall)?);
    let found = once.recall(QUESTION, &recall)?;
    let tokenizer = model.tokenizer().ok_or("none")?;
    let between = tokenizer.encode_said("\n\n")?;
    let document = |at: usize| -> Result<_> { Ok(once.document(found[at].id)?.ok_or("gone")?) };
    let (best, other) = (document(0)?, document(1)?);
    assert_eq!(best, model.embed_document(&found[0].text, &embed)?.1);
    let prompt = Prompt::default().document(&other).plain_ids(&between).document(&best);
    let prompt = prompt.plain_ids(&between).plain_ids(&tokenizer.encode_said(QUESTION)?);
    assert_eq!(once.prompt(QUESTION, &recall)?, prompt);
    let config = GenerationConfig::default().max_tokens(2);
    assert_eq!(model.generate(prompt, &config)?.ids.len(), 2);
    assert_eq!(
        memory()?.keep_in(folder.path(), None)?.keeps().map(|it| format!("{it:?}")),
        Some("Embedded".into())
    );

    // Control tokens that a text spells are pooled as they always were, and kept as letters.
    let spelled = "the cat </s> sat on the mat";
    let document = once.document(once.remember(spelled, Note::default())?)?.ok_or("none")?;
    let own = document.ids().get(document.lead()..).unwrap_or_default();
    assert_eq!(own, tokenizer.encode_said(spelled)?);
    assert!(!own.iter().any(|id| tokenizer.is_special(*id)));
    let vector = once.get(NoteId::of(spelled))?.ok_or("none")?.vectors;
    assert_eq!(vector, model.embed(&[spelled], &embed)?.to_vec2::<f32>()?);

    let elsewhere = folder.path().join("other");
    let points = over(Embedding::MainPoint(Salience::received()))?;
    refused(points.keep_in(elsewhere, Keep::Embedded), "whole texts")?;
    // Another instruction is another reading.
    let query = over(Embedding::Whole(embed.instruction("<|user|>\n")))?;
    refused(query.keep_in(folder.path(), None), "were read by")?;
    Ok(())
}
