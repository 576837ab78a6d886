//! Chat templates render as in transformers, byte for byte.

use std::error::Error;
use std::fs;

use hybrid_attention::{Message, Tokenizer};
use serde::Deserialize;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer");

/// The Llama-like fixture with another chat template.
fn with_template(template: &str) -> Result<Tokenizer> {
    let folder = tempfile::tempdir()?;
    for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        fs::copy(format!("{FIXTURES}/llama/{file}"), folder.path().join(file))?;
    }
    fs::write(folder.path().join("chat_template.jinja"), template)?;
    Ok(Tokenizer::from_folder(folder.path())?.ok_or("no tokenizer")?)
}

fn error_of(template: &str) -> Result<String> {
    let rendered = with_template(template)?.render_chat(&[Message::user("hi")], true);
    Ok(rendered.err().ok_or("rendered")?.to_string())
}

#[derive(Deserialize)]
struct Golden {
    templates: std::collections::HashMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: Option<String>,
    error: Option<String>,
}

#[test]
fn renders_as_transformers_does() -> Result {
    let golden: Golden =
        serde_json::from_str(&fs::read_to_string(format!("{FIXTURES}/chat.json"))?)?;
    let mut passed_over = 0;
    for (name, template) in &golden.templates {
        let tokenizer = with_template(template)?;
        for case in golden.cases.iter().filter(|case| case.template == *name) {
            let rendered = tokenizer.render_chat(&case.messages, case.add_generation_prompt);
            // What transformers leaves out without a word is refused here.
            if let Some(role) = unheard(case) {
                let error = rendered.err().ok_or("rendered")?.to_string();
                let expected =
                    format!("chat template: it passes over a message of the role {role:?}");
                assert_eq!(error, expected, "{name}");
                passed_over += 1;
                continue;
            }
            match (&case.text, rendered) {
                (Some(text), rendered) => assert_eq!(&rendered?, text, "{name}"),
                (None, Ok(text)) => return Err(format!("{name} rendered {text:?}").into()),
                (None, Err(error)) => {
                    let error = error.to_string();
                    let message = error.strip_prefix("chat template: ");
                    let expected = case.error.as_deref().or(message);
                    assert_eq!(message, expected, "{name}");
                }
            }
        }
    }
    assert_eq!((golden.cases.len(), passed_over), (210, 8));
    Ok(())
}

/// The role of a message, none of the usual ones, whose words transformers leaves out.
fn unheard(case: &Case) -> Option<&str> {
    let unusual = |role: &str| !matches!(role, "system" | "user" | "assistant" | "tool");
    let text = case.text.as_deref()?;
    let mut messages = case.messages.iter().filter(|message| unusual(&message.role));
    let message = messages.find(|message| !text.contains(&message.content))?;
    Some(&message.role)
}

/// A chat has a message, and the template writes it: unless it is of a role that templates have their own
/// ways with.
#[test]
fn nothing_is_passed_over_without_a_word() -> Result {
    let silent = with_template(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    )?;
    let message =
        |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let user = Message::user("hi");
    for tokenizer in [&silent, &with_template("x")?] {
        for add_generation_prompt in [true, false] {
            let none = tokenizer.render_chat(&[], add_generation_prompt).err().ok_or("rendered")?;
            assert_eq!(none.to_string(), "parameter messages: expected at least one, got none");
            assert!(tokenizer.encode_chat(&[], add_generation_prompt).is_err());
        }
    }
    for role in ["User", "developer", "", "ipython"] {
        let chat = [user.clone(), message(role, "not this")];
        let error = silent.render_chat(&chat, true).err().ok_or("rendered")?.to_string();
        assert_eq!(error, format!("chat template: it passes over a message of the role {role:?}"));
        assert!(silent.encode_chat(&chat, true).is_err());
    }
    for role in ["system", "assistant", "tool"] {
        assert_eq!(silent.render_chat(&[message(role, "not this"), user.clone()], true)?, "hi");
    }
    // Of blanks nothing is missed, and a template may trim what it writes.
    assert_eq!(silent.render_chat(&[message("developer", " \n"), user.clone()], true)?, "hi");
    let trims = with_template("{% for m in messages %}{{ m.content | trim }}{% endfor %}")?;
    assert_eq!(trims.render_chat(&[message("developer", " this "), user], true)?, "thishi");
    Ok(())
}

#[test]
fn the_date_is_local_and_a_bad_format_is_an_error() -> Result {
    let format = "%d %b %Y, %A %-d";
    let today = || jiff::Zoned::now().strftime(format).to_string();
    let before = today();
    let tokenizer = with_template(&format!("{{{{ strftime_now('{format}') }}}}"))?;
    let rendered = tokenizer.render_chat(&[Message::user("hi")], false)?;
    assert!(rendered == before || rendered == today(), "{rendered}");

    let error = error_of("{{ strftime_now('%!') }}")?;
    assert!(
        error.starts_with("chat template: invalid operation: strftime_now cannot write \"%!\": "),
        "{error}"
    );
    Ok(())
}

#[test]
fn hostile_templates_are_errors() -> Result {
    let endless =
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    assert_eq!(error_of(endless)?, "chat template: not finished after 100000 steps");
    assert_eq!(error_of("{{ raise_exception('no\nway') }}")?, "chat template: no\nway");
    let in_macro = "{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}";
    assert_eq!(error_of(in_macro)?, "chat template: deep");
    let nested = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert!(error_of(nested)?.contains("recursion limit"), "{}", error_of(nested)?);
    assert!(error_of(&"{{ (".repeat(20_000))?.contains("syntax error"));
    // One call of the compiler for each operator: as long as a template may be.
    for operator in ["+1", "|upper", ".b", " and 1", "[0]", "()"] {
        let long = format!("{{{{ 1{} }}}}", operator.repeat((1 << 17) / operator.len() - 10));
        with_template(&long)?.render_chat(&[Message::user("hi")], false).err();
    }
    let longer = error_of(&" ".repeat((1 << 17) + 1))?;
    assert_eq!(longer, "chat template: 131073 bytes long: at most 131072 are compiled");
    let json = error_of("{{ messages | tojson(ensure_ascii=true) }}")?;
    assert!(json.contains("tojson takes ensure_ascii=false and indent only"), "{json}");
    Ok(())
}

/// A model whose template does not parse is still of use for plain text.
#[test]
fn a_syntax_error_surfaces_when_rendering() -> Result {
    let tokenizer = with_template("{% if %}")?;
    assert!(tokenizer.has_chat_template());
    assert!(!tokenizer.encode("the cat", true)?.is_empty());
    let rendered = tokenizer.render_chat(&[Message::user("hi")], false);
    let error = rendered.err().ok_or("rendered")?.to_string();
    assert!(error.starts_with("chat template: syntax error: "), "{error}");
    Ok(())
}

#[test]
fn without_a_template_there_is_no_chat() -> Result {
    let tokenizer = Tokenizer::from_bytes(&fs::read(format!("{FIXTURES}/llama/tokenizer.json"))?)?;
    assert!(!tokenizer.has_chat_template());
    for messages in [&[][..], &[Message::user("hi")]] {
        let error = tokenizer.render_chat(messages, true).err().ok_or("rendered")?;
        assert_eq!(error.to_string(), "chat template: the checkpoint has none");
    }
    Ok(())
}

#[test]
fn a_chat_begins_with_one_bos() -> Result {
    let bos = Some(1);
    for template in ["x", "{{ bos_token }}x", "{{ bos_token }}{{ bos_token }}x"] {
        let ids = with_template(template)?.encode_chat(&[Message::user("hi")], false)?;
        assert_eq!(ids.first().copied(), bos, "{template}");
        assert_ne!(ids.get(1).copied(), bos, "{template}");
    }
    // This one adds no BOS by itself, so the template decides.
    let folder = format!("{FIXTURES}/byte_level");
    let tokenizer = Tokenizer::from_folder(folder.as_ref())?.ok_or("no tokenizer")?;
    let messages = [Message::user("hi"), Message::assistant("<s>")];
    assert_eq!(tokenizer.render_chat(&messages, true)?, "user: hi\nassistant: <s>\n");
    assert_eq!(
        tokenizer.encode_trusted_chat(&messages, true)?,
        tokenizer.encode("user: hi\nassistant: <s>\n", false)?
    );
    Ok(())
}
