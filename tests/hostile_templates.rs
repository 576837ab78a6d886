//! A chat template from a stranger cannot kill, starve or hang the program: it ends soon, with a typed error or
//! with the right text.

use std::error::Error as _;
use std::fs;
use std::time::{Duration, Instant};

use hybrid_attention::{Error, Message, Tokenizer};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

/// How long one may take, on a busy machine and with checks.
const SOON: Duration = Duration::from_secs(2);

fn tokenizer() -> Result<Tokenizer> {
    let folder = format!("{FIXTURES}/tokenizer/llama");
    Ok(Tokenizer::from_folder(folder.as_ref())?.ok_or("no tokenizer")?)
}

/// What `template` makes of a greeting, or its error, and how long it took.
fn outcome(template: &str) -> Result<(std::result::Result<String, String>, Duration)> {
    let tokenizer = tokenizer()?;
    let start = Instant::now();
    let rendered = tokenizer.with_chat_template(template).render_chat(&[Message::user("hi")], true);
    let took = start.elapsed();
    let outcome = match rendered {
        Ok(text) => Ok(text),
        Err(error @ Error::Template { .. }) => {
            assert!(error.source().is_none());
            Err(error.to_string())
        }
        Err(other) => return Err(other.into()),
    };
    Ok((outcome, took))
}

/// The error of a template that must not end well, in time.
fn refusal(name: &str, template: &str) -> Result<String> {
    let (outcome, took) = outcome(template)?;
    assert!(took < SOON, "{name} took {took:?}");
    let error = outcome.err().ok_or_else(|| format!("{name} rendered"))?;
    for beside_the_point in ["keyword", "unknown method", "unknown filter", "argument"] {
        assert!(!error.contains(beside_the_point), "{name}: {error}");
    }
    Ok(error)
}

#[test]
fn what_was_found_by_attack() -> Result {
    let mut names = Vec::new();
    for entry in fs::read_dir(format!("{FIXTURES}/hostile"))? {
        let path = entry?.path();
        let name = path.file_name().ok_or("no name")?.to_string_lossy().into_owned();
        refusal(&name, &fs::read_to_string(&path)?)?;
        names.push(name);
    }
    assert_eq!(names.len(), 9, "{names:?}");
    Ok(())
}

/// Text of `n` bytes in the variable `s`, at least as long as `2 ** n`.
fn text(n: u32) -> String {
    format!(
        "{{% set ns = namespace(s='ab') %}}{{% for i in range({n}) %}}{{% set ns.s = ns.s ~ ns.s %}}{{% endfor %}}{{% set s = ns.s %}}"
    )
}

#[test]
fn deep_and_cyclic_values() -> Result {
    let cycle = "{% set n = namespace() %}{% set n.x = n %}";
    for way in [
        "{{ n }}",
        "{{ n|tojson }}",
        "{{ n ~ '' }}",
        "{{ [n]|sort }}",
        "{{ raise_exception(n) }}",
        "{{ debug() }}",
        "{{ n|string }}",
        "{{ n == n }}",
        "x",
    ] {
        let error = refusal(way, &format!("{cycle}{way}"))?;
        assert_eq!(
            error, "chat template: it keeps a namespace or a loop in another value",
            "{way}"
        );
    }
    for (name, template) in [
        ("in a list", "{% set n = namespace() %}{% set n.x = [n] %}{{ n }}"),
        ("in a map", "{% set n = namespace() %}{% set n.x = {'a': [n]} %}{{ n }}"),
        ("in a tuple", "{% set n = namespace() %}{% set n.x = (n, 1) %}{{ n }}"),
        ("of two", "{% set n = namespace() %}{% set m = namespace(n=n) %}{% set n.m = m %}{{ n }}"),
        ("by position", "{% set n = namespace() %}{% set m = namespace({'n': n}) %}{{ m }}"),
        ("in a dict", "{% set n = namespace() %}{% set n.x = dict(n=n) %}{{ n }}"),
        ("unpacked", "{% set n = namespace() %}{% set a, n.x = 1, n %}{{ n }}"),
        ("in a loop", "{% set n = namespace() %}{% for n.x in [[n]] %}{{ n }}{% endfor %}"),
        (
            "loop kept",
            "{% set n = namespace() %}{% for i in [1] %}{% set n.l = loop %}{% endfor %}{{ n.l }}",
        ),
        (
            "loop changed",
            "{% set n = namespace() %}{% for i in [1] %}{{ loop.changed(loop) }}{% endfor %}",
        ),
    ] {
        let error = refusal(name, template)?;
        let known = ["keeps a namespace or a loop", "syntax error"];
        assert!(known.iter().any(|part| error.contains(part)), "{name}: {error}");
    }
    for deeper in [
        "[ns.x]",
        "{'a': ns.x}",
        "(ns.x,)",
        "[1] + [ns.x]",
        "[ns.x] * 2",
        "dict(a=ns.x)",
        "[ns.x]|list",
        "[ns.x]|map('list')",
        "[ns.x][:1]",
        "[ns.x]|batch(1)",
        "{'a': ns.x}.items()",
        "{'a': ns.x}|items",
        "[ns.x]|zip([1])",
        "[ns.x]|reverse",
        "[ns.x]|groupby(0)",
        "[ns.x]|slice(1)",
    ] {
        let template = format!(
            "{{% set ns = namespace(x=[]) %}}{{% for i in range(20000) %}}{{% set ns.x = {deeper} %}}{{% endfor %}}done"
        );
        refusal(deeper, &template)?;
    }
    // A thousand lists are one list of lists: nothing is deep here.
    let flat = "{% set ns = namespace(x=[]) %}{% for i in range(1000) %}{% set ns.x = ns.x + [i] %}{% endfor %}{{ ns.x|length }}{{ ns.x[1:]|length }}";
    assert_eq!(outcome(flat)?.0?, "1000999");
    Ok(())
}

#[test]
fn large_values() -> Result {
    let long = text(21); // 4 MiB, which is allowed
    assert_eq!(outcome(&format!("{long}{{{{ s|length }}}}"))?.0?, "4194304");
    for way in [
        "{{ s ~ s ~ s }}",
        "{{ s + s + s }}",
        "{{ s * 1000 }}",
        "{{ [s] * 1000 }}",
        "{{ [s, s, s, s]|join(s) }}",
        "{{ s.replace('a', s) }}",
        "{{ s|replace('', s) }}",
        "{{ s.join(s) }}",
        "{{ s.split('a') }}",
        "{{ s|split('a')|length }}",
        "{{ s|list|length }}",
        "{{ s|batch(1) }}",
        "{{ s.splitlines() }}{% for c in s %}{{ s }}{% endfor %}",
        "{{ '{0}{0}{0}{0}{0}{0}{0}{0}'.format(s) }}",
        "{{ '%s%s%s%s'|format(s, s, s, s) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:.1000000000f}'.format(1.5) }}",
        "{{ s|indent(1000000000) }}",
        "{{ [1]|batch(1000000000, 0) }}",
        "{{ [1]|slice(1000000000) }}",
        "{{ 1.5|round(1000000000) }}",
        "{{ [s, s, s, s]|tojson }}",
        "{{ [s, s, s, s]|pprint }}",
        "{{ [s, s, s, s]|string }}",
        "{% set x %}{% for i in range(1000) %}{{ s }}{% endfor %}{% endset %}",
        "{% macro m() %}{% for i in range(1000) %}{{ s }}{% endfor %}{% endmacro %}{{ m() }}",
        "{% filter upper %}{% for i in range(1000) %}{{ s }}{% endfor %}{% endfilter %}",
        "{% macro m(t) %}{{ m(t ~ t) }}{% endmacro %}{{ m(s) }}",
        "{% for t in [s] recursive %}{{ loop([t ~ t]) }}{% endfor %}",
        "{% autoescape true %}{{ s ~ s }}{{ s }}{{ s }}{{ s }}{% endautoescape %}",
        "{{ raise_exception([s, s, s, s]) }}",
        "{{ strftime_now(s) }}",
    ] {
        refusal(way, &format!("{long}{way}"))?;
    }
    for (name, template) in [
        ("constant", "{{ 'a' * 100000000 * 10 }}".to_owned()),
        ("sum of constants", format!("{{{{ {}'' }}}}", "'a' * 99999999 ~ ".repeat(5000))),
        ("raw text", format!("{}{}{}", "{% for i in range(100000) %}", "a".repeat(100_000), "{% endfor %}")),
        ("lists of lists", "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}".to_owned()),
        ("maps of maps", "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}".to_owned()),
        ("many names", format!("{}{}", text(21), (0..2000).map(|i| format!("{{% set v{i} = s ~ {i} %}}")).collect::<String>())),
        ("list doubled", "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}".to_owned()),
        ("big number", "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x ** 9 %}{% endfor %}{{ ns.x }}".to_owned()),
    ] {
        refusal(name, &template)?;
    }
    Ok(())
}

#[test]
fn slow_steps() -> Result {
    let long = text(21);
    let list = "{% set l = range(100000)|list %}";
    let many = |step: &str| {
        format!(
            "{long}{list}{{% for a in range(100000) %}}{{% for b in range(20) %}}{{% set q = {step} %}}{{% endfor %}}{{% endfor %}}"
        )
    };
    for step in [
        "s|upper",
        "s == s ~ ''",
        "'x' in s",
        "s < s",
        "s.count('x')",
        "s.find('x')",
        "s|trim('abc')",
        "s.strip('ab')",
        "s[1000000]",
        "s[::-1]|length",
        "s|length",
        "s is eq s",
        "s is upper",
        "s|reverse|length",
        "s|title|length",
        "s.isalpha()",
        "l|sort|length",
        "l == l",
        "-1 in l",
        "l|unique|length",
        "l|max",
        "l|sum",
        "l|map('string')|list|length",
        "l|select('eq', -1)|list",
        "l[1:]|length",
        "l|list|length",
        "l|reverse|length",
        "l|tojson|length",
        "l|string|length",
        "l.count(1)",
        "l|groupby(0)|length",
        "l|batch(2)|length",
        "l|join|length",
        "dict(a=l)",
        "s|int(0)",
        "s|safe|length",
        "s|e|length",
        "{s: 1}",
        "{'a': 1}[s]",
        "s in {'a': 1}",
        "l|reject('eq', s)|list|length",
        "l|zip(l)|length",
        "s|first",
        "s|last",
    ] {
        refusal(step, &many(step))?;
    }
    let strip = format!("{long}{{{{ s.strip(s) }}}}");
    refusal("strip", &strip)?;
    Ok(())
}

#[test]
fn panics_and_endless_recursion() -> Result {
    for template in [
        "{{ '{0[é'.format(1) }}",
        "{{ '{0[é]}'.format([1]) }}",
        "{% for i in [1] %}{{ loop.cycle() }}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{{ caller }}{% endmacro %}{{ m() }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% include 'chat_template' %}",
        "{% extends 'chat_template' %}",
        "{% import 'chat_template' as me %}",
        "{{ look at(1) }}",
    ] {
        refusal(template, template)?;
    }
    // Or right: what Python gives for an empty slice backwards.
    for template in ["{{ 'abc'[1:2:-1] }}", "{{ [1, 2, 3][0:2:-1]|length }}"] {
        let (outcome, took) = outcome(template)?;
        assert!(took < SOON, "{template} took {took:?}");
        if let Ok(text) = outcome {
            assert!(matches!(text.as_str(), "" | "0"), "{template}: {text}");
        }
    }
    Ok(())
}

/// What is asked of templates of the field still goes, in long chats too.
#[test]
fn long_chats_are_rendered() -> Result {
    let template = "{% set ns = namespace(all='', n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}\
        {% set c = m.content.strip().split('</think>')[-1] | trim %}\
        {{ '<|' ~ m['role'] ~ '|>' + c + eos_token }}{% if messages[loop.index0 + 1:] | length == 0 %}end{% endif %}\
        {% if not loop.last and messages[loop.index0 + 1].role == m.role %}twice{% endif %}{% endfor %}{{ ns.n }}";
    let tokenizer = tokenizer()?.with_chat_template(template);
    for (count, length) in [(1, 10), (1000, 100), (30, 100_000), (1, 3_000_000)] {
        let words = "word ".repeat(length / 5);
        let turn = |i: usize| match i % 2 {
            0 => Message::user(words.clone()),
            _ => Message::assistant(words.clone()),
        };
        let messages: Vec<Message> = (0..count).map(turn).collect();
        let text = tokenizer.render_chat(&messages, true)?;
        assert!(text.ends_with(&format!("</s>end{count}")), "{count} {length}");
        assert_eq!(text.matches(words.trim()).count(), count);
    }
    Ok(())
}
