//! The page: one self-contained HTML file.

use hybrid_attention::thought::{Halted, Map, Maps, TokenTrace};
use serde_json::Value;

use super::draw::{self, Label, Scale};
use super::tokens::{Token, escape, label, plain, visible};
use super::{Inspection, Passes, Said, steps_page};
use crate::stubs;
use crate::terminal::Result;

/// The most rows of a drawing; a longer prompt's neighbouring tokens are pooled.
pub(super) const MOST: usize = 128;

/// The same for the drawings of single layers.
const MOST_SMALL: usize = 32;

/// Columns for the names along a drawing.
const LABEL: usize = 14;

pub(super) fn render(inspection: &Inspection) -> Result<String> {
    let count = inspection.tokens.len();
    let title = match &inspection.passes {
        Some(_) => format!("What the thought passes did to {count} tokens"),
        None => format!("What attention does with {count} tokens"),
    };
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>{title}</title>\n<style>\n{}</style>\n</head>\n<body>\n<h1>{title}</h1>\n",
        include_str!("style.css"),
    );
    if let Some(passes) = &inspection.passes {
        let settings = serde_json::to_value(&passes.settings)?;
        page += &facts(inspection, passes, &settings);
        page += &answers(passes);
        page += &candidates(passes)?;
        page += &drift(passes)?;
        page += &table(&inspection.tokens, passes);
        page += &maps(&inspection.tokens, passes, &settings)?;
    }
    page += &steps_page::render(&inspection.attention, &inspection.tokens)?;
    page += "</body>\n</html>\n";
    Ok(page)
}

/// What was run, and how it ended.
fn facts(inspection: &Inspection, passes: &Passes, settings: &Value) -> String {
    let span = match (span_end(settings, 0), span_end(settings, 1)) {
        (Some(a), Some(b)) => format!("{a}..{b} of {}", inspection.layers),
        _ => format!("all {}", inspection.layers),
    };
    let hand_off = match &settings["hand_off"] {
        Value::String(name) if name == "refined" => {
            "refined: the model reads the thoughts in place of its embeddings".to_owned()
        }
        Value::String(name) if name == "key_value" => {
            "key-value: the model attends to the keys and values of the thoughts".to_owned()
        }
        other => other.to_string(),
    };
    let tokens = &inspection.tokens;
    let thinks = tokens.iter().filter(|token| token.thinks).count();
    let trace = &passes.trace;
    let seconds: Vec<String> =
        trace.passes.iter().map(|pass| format!("{:.2}", pass.seconds)).collect();
    let mut rows = vec![
        ("Model", inspection.model.clone()),
        ("Prompt", format!("{} tokens, {thinks} of them thought about", tokens.len())),
        ("Passes", format!("{} of at most {}", trace.passes.len(), settings["passes"])),
        ("Ended", why(passes, settings)),
        ("Layers", span),
        ("Refinement", refinement(&settings["refine"])),
        ("Hand-off", hand_off),
        ("Seconds", format!("{} for each pass", seconds.join(", "))),
    ];
    if !settings["noise"].is_null() {
        rows.push(("Noise", noise(&settings["noise"])));
    }
    let rows = rows.into_iter();
    let rows: String =
        rows.map(|(name, value)| format!("<dt>{name}</dt><dd>{}</dd>\n", text(&value))).collect();
    format!(
        "<p>Before it answered, the model passed over the prompt several times. In a pass every token \
         of the context sees every other, also those after it, and its <em>thought</em>, the vector that enters the \
         layers, is refined.</p>\n<dl>\n{rows}</dl>\n"
    )
}

/// `gaussian, of 0.1 of each vector's length, on what enters the first pass; seed 7`
fn noise(noise: &Value) -> String {
    let word = |key: &str, default| noise[key].as_str().unwrap_or(default).to_owned();
    let of = match word("of", "coordinate").as_str() {
        "length" => "of each vector's length",
        "row" => "for each vector as a whole",
        _ => "in each coordinate",
    };
    let verb = if noise["subtract"] == true { "taken off" } else { "on" };
    let norm = if noise["keep_norm"] == true { ", whose length is kept" } else { "" };
    let (shape, seed) = (word("shape", "gaussian"), noise["seed"].as_u64().unwrap_or(0));
    format!("{shape}, {} {of}, {verb} what enters the first pass{norm}; seed {seed}", noise["sd"])
}

/// One end of the chosen layers, if any were chosen.
fn span_end(settings: &Value, end: usize) -> Option<u64> {
    settings["span"][end].as_u64()
}

/// Common refinements as equations, where h is what the layers make of the thoughts z.
fn refinement(refine: &Value) -> String {
    let Some([Value::Object(op)]) = refine.as_array().map(Vec::as_slice) else {
        return if refine.is_null() { "the checkpoint's own".into() } else { refine.to_string() };
    };
    match (op.len(), op.get("op").and_then(Value::as_str), op.get("weight")) {
        (1, Some("interpolate"), None) => "z += (h − z) / passes".into(),
        (2, Some("interpolate"), Some(Value::Number(weight))) => format!("z += {weight} (h − z)"),
        _ => refine.to_string(),
    }
}

/// Why the loop ended.
fn why(passes: &Passes, settings: &Value) -> String {
    let rules = settings["halt"].as_array().into_iter().flatten();
    let tolerance = |name| rules.clone().find_map(|rule| rule[name].as_f64()).unwrap_or_default();
    match passes.trace.halted.first() {
        Some(Halted::Cap) => "all passes were run".into(),
        Some(Halted::Drift) => format!("drift fell below {}", tolerance("drift")),
        Some(Halted::Cosine) => format!("1 − cosine fell below {}", tolerance("cosine")),
        Some(Halted::Kl) => format!("KL fell below {} nats", tolerance("kl")),
        Some(other) => format!("{other:?}"),
        None => "nothing was thought about".into(),
    }
}

/// The control: what the model says without thinking, beside what it says after thinking.
fn answers(passes: &Passes) -> String {
    let (plain, thought) = (&passes.plain, &passes.thought);
    let id = |token: &Token| token.id;
    let same = plain.tokens.iter().zip(&thought.tokens).take_while(|(a, b)| id(a) == id(b)).count();
    let verdict = match same == plain.tokens.len().max(thought.tokens.len()) {
        true => "The two are the same.",
        false => "They part where it is marked.",
    };
    let chosen = match passes.candidates.len() {
        0 => "",
        _ => " The latter is the best of several that were drawn.",
    };
    format!(
        "<h2>Its answer, without and with thinking</h2>\n\
         <p>The beginning of the likeliest answer to the same prompt, without any thought pass and after \
         them.{chosen} {verdict} Another answer is not a better one.</p>\n<div class=\"side\">\n{}{}</div>\n",
        card("Without thinking", plain, same),
        card("After thinking", thought, same),
    )
}

fn card(title: &str, said: &Said, same: usize) -> String {
    let token = |(index, token): (usize, &Token)| {
        let text = text(&token.text);
        if index == same { format!("<mark>{text}</mark>") } else { text }
    };
    let text: String = said.tokens.iter().enumerate().map(token).collect();
    let sum: f64 = said.logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
    format!(
        "<div class=\"card\"><h3>{title}</h3><p class=\"said\">{text}</p><p class=\"note\">{:.2} nats a \
         token: how surprised the model is by its own words</p></div>\n",
        -sum / said.logprobs.len().max(1) as f64,
    )
}

/// Who was dropped when, and what each had said.
fn candidates(passes: &Passes) -> Result<String> {
    if passes.candidates.is_empty() {
        return Ok(String::new());
    }
    let stubs = stubs::ranked(&passes.candidates);
    let mut rows = String::new();
    for stub in &stubs {
        let at = stub.dropped_at.map_or_else(String::new, |at| at.to_string());
        let score = stub.score().map_or_else(String::new, |score| format!("{score:.3}"));
        rows += &format!(
            "<tr><td>{}</td><td>{score}</td><td>{at}</td><td class=\"text\">{}</td><td class=\"text\">{}</td></tr>\n",
            stub.index,
            stubs::name(stub.reason),
            escape(&visible(&stub.text)),
        );
    }
    Ok(format!(
        "<h2>Candidates</h2>\n<p>The answer is what was left of {} that grew side by side. Each bar is as long as \
         its text, in tokens; its colours are the scores that it had on the way. The best is on top, and below it those \
         that were dropped, the last ones first.</p>\n<figure id=\"candidates\"><div>{}</div></figure>\n\
         <div class=\"scroll\"><table>\n<thead><tr><th></th><th>score</th><th>dropped<br/>at token</th>\
         <th class=\"text\">became of it</th><th class=\"text\">text</th></tr></thead>\n<tbody>\n{rows}</tbody>\n\
         </table></div>\n",
        stubs.len(),
        draw::race(&stubs)?,
    ))
}

fn drift(passes: &Passes) -> Result<String> {
    Ok(format!(
        "<h2>Drift</h2>\n<p>How far each pass moved the thoughts, relative to their length, mean over the \
         tokens. Under the dashed line, at \
         0.03, further passes change little. The scale is logarithmic.</p>\n\
         <figure id=\"drift\"><div>{}</div></figure>\n",
        draw::drift(&passes.trace.drift())?,
    ))
}

/// A row for each token.
fn table(tokens: &[Token], passes: &Passes) -> String {
    let first = passes.trace.first.as_ref();
    let traces: Vec<&TokenTrace> =
        passes.trace.passes.iter().filter_map(|pass| pass.tokens.as_ref()).collect();
    let (Some(first), Some(last)) = (first, traces.last()) else { return String::new() };
    let of = |values: &Vec<Vec<f32>>, token: usize| {
        values.first().and_then(|row| row.get(token)).copied().unwrap_or_default()
    };
    let most =
        traces.iter().flat_map(|trace| trace.kl.iter().flatten()).copied().fold(0.0, f32::max);
    let mut rows = String::new();
    for (index, token) in tokens.iter().enumerate() {
        let (class, part) = if token.thinks { ("context", "context") } else { ("plain", "plain") };
        rows += &format!(
            "<tr class=\"{class}\"><td>{index}</td><td class=\"text\">{}</td><td class=\"text\">{part}</td>",
            escape(&visible(&token.text)),
        );
        for norms in [&first.norm, &last.norm] {
            rows += &format!("<td>{:.1}</td>", of(norms, index));
        }
        for values in [&last.cosine, &first.entropy, &last.entropy] {
            rows += &format!("<td>{:.3}</td>", of(values, index));
        }
        for trace in &traces {
            let value = of(&trace.kl, index);
            let share = 100.0 * value / most.max(f32::MIN_POSITIVE);
            rows += &format!("<td class=\"bar\" style=\"--share:{share:.0}%\">{value:.3}</td>");
        }
        rows += "</tr>\n";
    }
    let kl: String =
        (1..=traces.len()).map(|pass| format!("<th>KL<br/>pass {pass}</th>")).collect();
    format!(
        "<h2>Tokens</h2>\n<p>What became of each token. <em>Context</em> was thought about, <em>plain</em> \
         (grey) only read, as the prompt's last token always is. The <em>norm</em> is the length of its \
         thought, before and after all passes; the <em>cosine</em> compares the two directions, where 1 is \
         unmoved. <em>Entropy</em>, in nats, is how open the next token is; <em>KL</em>, also in nats, is how \
         much a pass changed what the next token might be, when the thoughts are read causally.</p>\n\
         <p class=\"note\">␣ is a space, ⏎ a line break, ⋯ a part of a character that the next token completes.</p>\n\
         <div class=\"scroll\"><table id=\"tokens\">\n<thead><tr><th></th><th class=\"text\">token</th>\
         <th class=\"text\">part</th><th>norm<br/>before</th><th>norm<br/>after</th><th>cosine</th>\
         <th>entropy<br/>before</th><th>entropy<br/>after</th>{kl}</tr></thead>\n<tbody>\n{rows}</tbody>\n\
         </table></div>\n"
    )
}

/// Similarity and attention, pass by pass.
fn maps(tokens: &[Token], passes: &Passes, settings: &Value) -> Result<String> {
    let passes: Vec<&Maps> =
        passes.trace.passes.iter().filter_map(|pass| pass.maps.as_ref()).collect();
    if passes.is_empty() {
        return Ok(String::new());
    }
    let size = tokens.len().div_ceil(MOST).max(1);
    let labels = labels(tokens, size);
    let similarity: Vec<Map> = passes
        .iter()
        .filter_map(|maps| maps.similarity.first())
        .map(|map| pool(map, (size, size), |values, _| share(values, values.len())))
        .collect();
    let layers: Vec<Vec<&Map>> = passes
        .iter()
        .map(|maps| maps.attention.iter().filter_map(|layer| layer.first()).collect())
        .collect();
    let attention: Vec<Map> =
        layers.iter().map(|layers| pool(&mean(layers), (size, size), share)).collect();

    // One scale for all passes, so that they can be compared.
    let least = similarity.iter().flatten().flatten().copied().fold(1.0, f32::min);
    let alike = Scale { name: "cosine", min: least, max: 1.0, root: false };
    let most = attention.iter().flatten().flatten().copied().fold(0.0, f32::max);
    let seen = Scale { name: "share of the row's attention", min: 0.0, max: most, root: true };

    let first_layer = span_end(settings, 0).unwrap_or(0) as usize;
    let mut page = format!(
        "<h2>Similarity and attention</h2>\n\
         <p><em>Similarity</em> is how alike the thoughts of two tokens are after the pass: the cosine \
         between them. Bright squares are words whose thoughts have become nearly one.</p>\n\
         <p><em>Attention</em> is where each token looked during the pass: a row is the token that looks, a \
         column the token looked at, the colour the share of its attention, mean over heads and layers. What \
         is right of the diagonal comes later in the text; a plain reading never sees it, and plain tokens \
         (grey) do not.</p>\n{}",
        pooling_note(tokens.len(), size),
    );
    for (index, ((similarity, attention), layers)) in
        similarity.iter().zip(&attention).zip(&layers).enumerate()
    {
        let pass = index + 1;
        let alike = draw::heat_map(similarity, (&labels, &labels), ("token", "token"), &alike)?;
        let seen = draw::heat_map(
            attention,
            (&labels, &labels),
            ("token that looks", "token looked at"),
            &seen,
        )?;
        page += &format!(
            "<section id=\"pass-{pass}\">\n<h3>Pass {pass}</h3>\n<div class=\"side\">\n\
             <figure class=\"similarity\"><figcaption>Similarity after pass {pass}</figcaption>\
             <div>{alike}</div></figure>\n\
             <figure class=\"attention\"><figcaption>Attention in pass {pass}, mean of {} layers</figcaption>\
             <div>{seen}</div></figure>\n</div>\n{}</section>\n",
            layers.len(),
            by_layer(layers, first_layer)?,
        );
    }
    Ok(page)
}

/// The attention of each layer by itself, collapsed.
fn by_layer(layers: &[&Map], first: usize) -> Result<String> {
    let count = layers.first().map_or(0, |map| map.len());
    let size = count.div_ceil(MOST_SMALL).max(1);
    let scale = Scale { name: "share of the row's attention", min: 0.0, max: 1.0, root: true };
    let mut figures = String::new();
    for (layer, map) in (first..).zip(layers) {
        figures += &format!(
            "<figure><figcaption>layer {layer}</figcaption><div>{}</div></figure>\n",
            draw::small_map(&pool(map, (size, size), share), &scale)?,
        );
    }
    Ok(format!(
        "<details><summary>Attention layer by layer</summary>\n<p class=\"note\">Rows and columns as \
         above. {}</p>\n{}\n<div class=\"side small\">\n{figures}</div>\n</details>\n",
        pooled_by(size),
        draw::legend(&scale)?,
    ))
}

fn pooling_note(count: usize, size: usize) -> String {
    if size == 1 {
        return String::new();
    }
    format!(
        "<p class=\"note\" id=\"pooled\">The prompt has {count} tokens. {} Cosines are the mean of theirs, \
         shares of attention add up along the row. The JSON of <code>--json</code> has every token.</p>\n",
        pooled_by(size),
    )
}

fn pooled_by(size: usize) -> String {
    match size {
        1 => String::new(),
        _ => format!("Here {size} neighbouring tokens are one row and column."),
    }
}

/// The names of rows and columns: for each group, its first token.
pub(super) fn labels(tokens: &[Token], size: usize) -> Vec<Label> {
    let of_group = |group: &[Token]| {
        let first = group.first().map_or("", |token| &token.text);
        Label { text: label(first, LABEL), strong: group.iter().any(|token| token.thinks) }
    };
    tokens.chunks(size).map(of_group).collect()
}

/// A map pooled in rectangles of so many rows and columns: `merge` of the numbers in each, and their rows.
pub(super) fn pool(
    map: &Map,
    (tall, wide): (usize, usize),
    merge: impl Fn(&[f32], usize) -> f32,
) -> Map {
    let columns = map.first().map_or(0, Vec::len);
    let row = |rows: &[Vec<f32>]| {
        let rectangle = |from: usize| {
            let values = rows.iter().flat_map(|row| row.iter().skip(from).take(wide));
            merge(&values.copied().collect::<Vec<_>>(), rows.len())
        };
        (0..columns).step_by(wide).map(rectangle).collect::<Vec<_>>()
    };
    map.chunks(tall).map(row).collect()
}

/// Pooled attention is what the rows on average give to all of the columns together.
fn share(values: &[f32], rows: usize) -> f32 {
    values.iter().sum::<f32>() / rows as f32
}

fn mean(maps: &[&Map]) -> Map {
    let Some(first) = maps.first() else { return Map::new() };
    let mut mean: Map = first.iter().map(|row| vec![0.0; row.len()]).collect();
    for map in maps {
        for (sums, values) in mean.iter_mut().flatten().zip(map.iter().flatten()) {
            *sums += values / maps.len() as f32;
        }
    }
    mean
}

/// Text between tags, to be read by a person.
fn text(text: &str) -> String {
    escape(&plain(text))
}
