//! Models are found in the cache of the Hugging Face hub as `huggingface_hub` lays it out, without a
//! request; names lead nowhere else. Downloads are in `hub.rs`.

mod common;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device};
use common::hub::{Golden, write_reference};
use common::{Result, fixture, logged};
use hybrid_attention::hub::{Hub, Pretrained};
use hybrid_attention::{Error, GenerationConfig, HybridModel};
use proptest::prelude::*;
use serde_json::Value;

/// A hub that is never asked.
fn offline(cache: &Path) -> Hub {
    Hub::from_vars(|_| None).cache(cache).offline(true)
}

fn find(
    model: impl Into<Pretrained>,
    cache: &Path,
) -> hybrid_attention::Result<std::path::PathBuf> {
    model.into().hub(offline(cache)).fetch(|_| ())
}

/// A repository with files of these names, at the commit that `main` stands for.
fn repository(golden: &Golden, files: &[&str]) -> Result<tempfile::TempDir> {
    let cache = tempfile::tempdir()?;
    for file in files {
        let path = golden.snapshot(cache.path())?.join(file);
        fs::create_dir_all(path.parent().ok_or("no parent")?)?;
        fs::write(path, "")?;
    }
    write_reference(golden, cache.path(), "main")?;
    Ok(cache)
}

/// Where a path was meant to be a name, it is said who takes names.
#[test]
fn a_name_in_the_place_of_a_path_is_pointed_on() -> Result {
    let error = |path: &str| -> Result<String> {
        let opened = HybridModel::from_folder(path, None, &Device::Cpu);
        Ok(opened.err().ok_or("opened")?.to_string())
    };
    assert!(error("org/no-such-model")?.contains("HybridModel::from_pretrained"));
    for path in ["no-such-model", "/org/no-such-model", "a/b/c"] {
        assert!(!error(path)?.contains("from_pretrained"), "{path}");
    }
    Ok(())
}

#[test]
#[cfg(unix)] // its paths are
fn the_cache_is_where_huggingface_hub_has_it() -> Result {
    let golden = Golden::read()?;
    let cases = golden.0.get("settings").and_then(Value::as_array).ok_or("no settings")?;
    assert!(cases.len() > 10);
    for case in cases {
        let var = |name: &str| Some(OsString::from(case.get("env")?.get(name)?.as_str()?));
        let hub = Hub::from_vars(var);
        assert_eq!(
            case.get("cache").and_then(Value::as_str),
            hub.cache_folder().to_str(),
            "{case}"
        );
        assert_eq!(case.get("offline").and_then(Value::as_bool), Some(hub.is_offline()), "{case}");
    }
    Ok(())
}

#[test]
fn settings_show_no_token() {
    let vars = |name: &str| match name {
        "HF_TOKEN" => Some("hf_secret".into()),
        "HF_HOME" => Some("/hf".into()),
        _ => None,
    };
    let hub = Hub::from_vars(vars);
    assert!(!format!("{hub:?}").contains("secret"));
    assert!(format!("{hub:?}").contains("set"));
    let model = Pretrained::new("org/name").hub(hub.token(Some("other_secret")));
    assert!(!format!("{model:?}").contains("secret"));
}

#[test]
fn names_are_those_that_huggingface_hub_accepts() -> Result {
    let (golden, cache) = (Golden::read()?, tempfile::tempdir()?);
    let cases = golden.0.get("accepted").and_then(Value::as_object).ok_or("no names")?;
    assert!(cases.len() > 20);
    for (name, accepted) in cases {
        match (find(name.as_str(), cache.path()), accepted.as_bool()) {
            (Err(Error::NotCached { .. }), Some(true)) => {}
            (Err(Error::Parameter { name: "model" | "file", .. }), Some(false)) => {}
            (Err(Error::Io { .. }), Some(false)) if name.starts_with(['.', '/']) => {}
            (other, accepted) => {
                return Err(format!("{name}: {other:?}, accepted: {accepted:?}").into());
            }
        }
    }
    Ok(())
}

#[test]
#[cfg(unix)]
fn a_model_in_the_cache_is_the_one_in_the_folder() -> Result {
    let (golden, cache) = (Golden::read()?, tempfile::tempdir()?);
    common::hub::write_cache(&golden, cache.path())?;
    write_reference(&golden, cache.path(), "refs/pr/1")?;
    let (repo, commit) = (golden.text("repo")?, golden.text("commit")?);
    let snapshot = golden.snapshot(cache.path())?;
    for name in [
        repo.to_string(),
        format!("{repo}@main"),
        format!("{repo}@refs/pr/1"),
        format!("{repo}@{commit}"),
    ] {
        assert_eq!(find(name.as_str(), cache.path())?, snapshot, "{name}");
    }
    assert_eq!(find(Pretrained::new(repo).revision(commit), cache.path())?, snapshot);

    let answer = |model: HybridModel| -> Result<_> {
        let config = GenerationConfig::default().max_tokens(8);
        let answer = model.generate([1, 2, 3], &config)?;
        Ok((answer.ids, answer.logprobs))
    };
    let there = Pretrained::from(repo.to_string()).hub(offline(cache.path()));
    let there = HybridModel::from_pretrained(there, DType::F32, &Device::Cpu)?;
    let here = HybridModel::from_folder(fixture("tied_sharded"), DType::F32, &Device::Cpu)?;
    assert_eq!(answer(there)?, answer(here)?);
    // and the folder of the repository opens as before
    let folder = golden.folder(cache.path())?;
    HybridModel::from_folder(&folder, DType::F32, &Device::Cpu)?;
    Ok(())
}

#[test]
fn a_path_that_exists_comes_first() -> Result {
    let cache = tempfile::tempdir()?;
    let folder = fixture("window");
    let path = folder.to_str().ok_or("not a text")?;
    assert_eq!(find(path, cache.path())?, folder);
    HybridModel::from_pretrained(path, DType::F32, &Device::Cpu)?;
    // A path has no revisions.
    let refused = find(Pretrained::new(path).revision("main"), cache.path());
    assert!(matches!(refused, Err(Error::Parameter { name: "model", .. })), "{refused:?}");
    Ok(())
}

#[test]
fn what_is_not_there_is_said_with_where_and_how() -> Result {
    let (golden, cache) = (Golden::read()?, tempfile::tempdir()?);
    let error = find("org/other@v2/x.Q4_0.gguf", cache.path());
    let Err(Error::NotCached { model, looked_in, hint }) = error else {
        return Err(format!("{error:?}").into());
    };
    assert_eq!(model, "org/other@v2/x.Q4_0.gguf");
    assert_eq!(looked_in, cache.path().join("models--org--other"));
    assert!(hint.contains("`hf download org/other x.Q4_0.gguf --revision v2`"), "{hint}");
    // Another revision than those in the cache, and a commit whose snapshot is not there.
    let cache = repository(&golden, &["config.json", "model.safetensors"])?;
    let repo = golden.text("repo")?;
    let other = "f".repeat(40);
    for revision in ["v2", "0123456", other.as_str()] {
        let error = find(Pretrained::new(repo).revision(revision), cache.path());
        assert!(matches!(error, Err(Error::NotCached { .. })), "{revision}: {error:?}");
    }
    // `huggingface_hub` writes the reference before there is a snapshot.
    fs::remove_dir_all(golden.folder(cache.path())?.join("snapshots"))?;
    let error = find(repo, cache.path());
    assert!(matches!(error, Err(Error::NotCached { .. })), "{error:?}");
    Ok(())
}

#[test]
#[cfg(unix)]
fn a_part_of_a_model_is_none() -> Result {
    let golden = Golden::read()?;
    let wanted = |file: &str| file == "config.json" || file.ends_with("of-00009.safetensors");
    let files: Vec<_> = golden.files()?.into_iter().filter(|(file, _)| wanted(file)).collect();
    assert_eq!(files.len(), 10);
    for (file, etag) in files {
        // Its blob is not there yet, or not even its link.
        for link_too in [false, true] {
            let cache = tempfile::tempdir()?;
            common::hub::write_cache(&golden, cache.path())?;
            let blob = golden.folder(cache.path())?.join("blobs").join(&etag);
            fs::rename(&blob, blob.with_extension("incomplete"))?;
            if link_too {
                fs::remove_file(golden.snapshot(cache.path())?.join(&file))?;
            }
            let error = find(golden.text("repo")?, cache.path());
            let Err(Error::IncompleteDownload { missing, snapshot, hint, .. }) = error else {
                return Err(format!("{file}: {error:?}").into());
            };
            assert_eq!((missing, snapshot), (file.clone(), golden.snapshot(cache.path())?));
            assert!(hint.contains("hf download org/tied-sharded"), "{hint}");
        }
    }
    let cache = tempfile::tempdir()?;
    common::hub::write_cache(&golden, cache.path())?;
    fs::remove_file(golden.snapshot(cache.path())?.join("model.safetensors.index.json"))?;
    let error = find(golden.text("repo")?, cache.path());
    assert!(
        matches!(&error, Err(Error::IncompleteDownload { missing, .. }) if missing == "its weights"),
        "{error:?}"
    );
    Ok(())
}

#[test]
fn weights_are_chosen_as_folders_choose_them() -> Result {
    let golden = Golden::read()?;
    let cases: [(&[&str], Option<&str>); 8] = [
        (&["config.json", "model.safetensors", "x.gguf"], Some("")),
        (&["params.json", "consolidated.safetensors", "x.gguf"], Some("")),
        (&["adapter_config.json", "adapter_model.safetensors"], Some("")),
        (&["config.json", "adapter_model.safetensors"], None),
        (&["model.safetensors"], None),
        (&["config.json", "pytorch_model.bin"], None),
        (&["config.json", "x.gguf", "mmproj-x.gguf"], Some("x.gguf")),
        (&["Q4_0/x-Q4_0.gguf"], Some("Q4_0/x-Q4_0.gguf")),
    ];
    for (files, expected) in cases {
        let cache = repository(&golden, files)?;
        match (find(golden.text("repo")?, cache.path()), expected) {
            (Ok(path), Some(expected)) => {
                let snapshot = golden.snapshot(cache.path())?;
                assert_eq!(path.strip_prefix(snapshot)?, Path::new(expected), "{files:?}");
            }
            (Err(Error::IncompleteDownload { .. }), None) => {}
            (other, _) => return Err(format!("{files:?}: {other:?}").into()),
        }
    }
    Ok(())
}

#[test]
fn gguf_files_are_found_by_name_and_by_tag() -> Result {
    let golden = Golden::read()?;
    let files = [
        "m.Q4_K_M.gguf",
        "m.IQ4_K_M.gguf",
        "m-Q8_0-00001-of-00002.gguf",
        "m-Q8_0-00002-of-00002.gguf",
        "BF16/m-BF16-00002-of-00003.gguf",
        "BF16/m-BF16-00003-of-00003.gguf",
        "m-UD-Q4_K_XL.gguf",
        "m-Q4_K_XL.gguf",
        "mmproj-F16.gguf",
        "config.json",
        "model.safetensors",
    ];
    let cache = repository(&golden, &files)?;
    let repo = golden.text("repo")?;
    let snapshot = golden.snapshot(cache.path())?;
    let found = |model: Pretrained| -> hybrid_attention::Result<String> {
        let path = find(model, cache.path())?;
        Ok(path.strip_prefix(&snapshot).unwrap_or(&path).to_string_lossy().into_owned())
    };
    for (behind, expected) in [
        ("", ""),
        ("/m.Q4_K_M.gguf", "m.Q4_K_M.gguf"),
        (":m.Q4_K_M.gguf", "m.Q4_K_M.gguf"),
        (":Q4_K_M", "m.Q4_K_M.gguf"),
        (":q4_k_m", "m.Q4_K_M.gguf"),
        ("@main:IQ4_K_M", "m.IQ4_K_M.gguf"),
        (":Q8_0", "m-Q8_0-00001-of-00002.gguf"),
        ("/m-Q8_0-00002-of-00002.gguf", "m-Q8_0-00001-of-00002.gguf"),
        (":UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        ("/mmproj-F16.gguf", "mmproj-F16.gguf"),
    ] {
        assert_eq!(found(Pretrained::new(format!("{repo}{behind}")))?, expected, "{behind}");
    }
    assert_eq!(found(Pretrained::new(repo).file("m.Q4_K_M.gguf"))?, "m.Q4_K_M.gguf");

    for (behind, lacks) in [
        (":BF16", "BF16/m-BF16-00001-of-00003.gguf"),
        (":Q5_0", "a GGUF file for Q5_0"),
        (":F16", "a GGUF file for F16"), // the projector is no language model
        ("/no.gguf", "no.gguf"),
    ] {
        match found(Pretrained::new(format!("{repo}{behind}"))) {
            Err(Error::IncompleteDownload { missing, .. }) => {
                assert_eq!(missing, lacks, "{behind}");
            }
            other => return Err(format!("{behind}: {other:?}").into()),
        }
    }
    // Several could be meant: they are all named.
    match found(Pretrained::new(format!("{repo}:Q4_K_XL"))) {
        Err(Error::Parameter { name: "model", expected, .. }) => {
            assert!(expected.contains("org/tied-sharded/m-UD-Q4_K_XL.gguf"), "{expected}");
            assert!(expected.contains("org/tied-sharded/m-Q4_K_XL.gguf"), "{expected}");
        }
        other => return Err(format!("{other:?}").into()),
    }
    Ok(())
}

#[test]
fn a_cache_cannot_lead_elsewhere() -> Result {
    let golden = Golden::read()?;
    let repo = golden.text("repo")?;
    let index = r#"{"weight_map": {"model.norm.weight": "../../../../outside.safetensors"}}"#;
    let cache = repository(&golden, &["config.json", "model.safetensors.index.json"])?;
    fs::write(cache.path().join("outside.safetensors"), "")?;
    fs::write(golden.snapshot(cache.path())?.join("model.safetensors.index.json"), index)?;
    let error = find(repo, cache.path());
    assert!(matches!(error, Err(Error::Malformed { .. })), "{error:?}");

    let cache = repository(&golden, &["config.json", "model.safetensors"])?;
    for commit in ["..", "../..", "/", "", "a/b", "a\\b"] {
        fs::write(golden.folder(cache.path())?.join("refs/main"), commit)?;
        let error = find(repo, cache.path());
        assert!(matches!(error, Err(Error::Malformed { .. })), "{commit:?}: {error:?}");
    }
    for revision in ["..", "../main", "/main", "a//b", "", "a\\..\\b", "C:/x", "a\nb"] {
        let error = find(Pretrained::new(repo).revision(revision), cache.path());
        assert!(
            matches!(error, Err(Error::Parameter { name: "revision", .. })),
            "{revision:?}: {error:?}"
        );
    }
    for file in ["../x.gguf", "/x.gguf", "a/../x.gguf", "x", "", ".gguf/..", "a\\x.gguf"] {
        let error = find(Pretrained::new(repo).file(file), cache.path());
        assert!(matches!(error, Err(Error::Parameter { name: "file", .. })), "{file:?}: {error:?}");
    }
    Ok(())
}

#[test]
fn an_update_that_cannot_be_is_named() -> Result {
    let golden = Golden::read()?;
    let cache = repository(&golden, &["config.json", "model.safetensors"])?;
    let model = Pretrained::new(golden.text("repo")?).update(true);
    let log = logged(|| {
        assert_eq!(find(model, cache.path())?, golden.snapshot(cache.path())?);
        Ok(())
    })?;
    assert!(log.iter().any(|line| line.contains("not updated")), "{log:?}");
    Ok(())
}

proptest! {
    #[test]
    fn no_name_leaves_the_cache(name in "[a-z.@:/\\\\-]{0,12}|\\PC{0,20}", revision in "\\PC{0,8}") {
        let cache = tempfile::tempdir()?;
        for model in [Pretrained::new(name.as_str()), Pretrained::new("org/name").revision(revision)] {
            match find(model, cache.path()) {
                Ok(path) => prop_assert_eq!(path, Path::new(&name)),
                Err(Error::NotCached { looked_in, .. }) => {
                    prop_assert_eq!(looked_in.parent(), Some(cache.path()));
                    let folder = looked_in.file_name().and_then(|name| name.to_str());
                    prop_assert!(folder.is_some_and(|it| it.starts_with("models--")));
                }
                Err(Error::Parameter { .. }) => {}
                Err(Error::Io { .. }) => prop_assert!(name.starts_with(['.', '/'])),
                Err(other) => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
