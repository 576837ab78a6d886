//! Attention step by step, on the page: small matrices as numbers, large ones as pictures.

use hybrid_attention::thought::Map;

use super::draw::{self, Label, Scale};
use super::page::{MOST, labels, pool};
use super::steps::{Columns, Step, What, Worked};
use super::tokens::{Token, escape};
use crate::terminal::Result;

/// The most rows and columns of a table of numbers.
const MOST_NUMBERS: usize = 12;

/// The most columns of a picture for the numbers of a vector.
const MOST_CHANNELS: usize = 64;

pub(super) fn render(worked: &[Worked], tokens: &[Token]) -> Result<String> {
    if worked.is_empty() {
        return Ok(String::new());
    }
    let size = tokens.len().div_ceil(MOST).max(1);
    let labels = labels(tokens, size);
    let mut page = "<h2>Attention step by step</h2>\n\
         <p>Each step follows from those before it, and is what the model computes. A row is a token that \
         looks; a column is a token looked at, or one number of a vector. What a token does not see has no \
         score.</p>\n"
        .to_string();
    let mut steps = worked.iter().flat_map(|it| &it.steps);
    let wide = |step: &Step| step.columns == Columns::Channels && widest(step) > MOST_CHANNELS;
    if size > 1 || steps.any(wide) {
        page += &format!(
            "<p class=\"note\">In a picture of more than {MOST} tokens, or of vectors of more than \
             {MOST_CHANNELS} numbers, neighbours are one row or column, with the mean of their numbers. The JSON \
             of <code>--json</code> has every number.</p>\n"
        );
    }
    for (number, worked) in (1..).zip(worked) {
        page += &format!(
            "<section id=\"steps-{number}\">\n<h3>{}</h3>\n<div class=\"side\">\n",
            title(worked.what)
        );
        for step in &worked.steps {
            let small = step.values.len().max(widest(step)) <= MOST_NUMBERS;
            let shown = if small { numbers(step, &labels) } else { picture(step, &labels, size)? };
            page += &format!(
                "<figure><figcaption><strong>{}</strong><br/>{}</figcaption>{shown}</figure>\n",
                escape(step.name),
                escape(step.formula),
            );
        }
        page += "</div>\n</section>\n";
    }
    Ok(page)
}

fn widest(step: &Step) -> usize {
    step.values.first().map_or(0, Vec::len)
}

fn title(what: What) -> String {
    match what {
        What::Causal { layer, head } => {
            format!("Layer {layer}, head {head}, while the prompt is read without thinking")
        }
        What::ThoughtPass { layer, head } => {
            format!("Layer {layer}, head {head}, in a thought pass over the first thoughts")
        }
        What::Cosine => "Cosines of the embeddings as scores, without any weights".to_string(),
    }
}

fn numbers(step: &Step, labels: &[Label]) -> String {
    let of_tokens = matches!(step.columns, Columns::Tokens | Columns::Shares);
    let heading = |column: usize| match labels.get(column) {
        Some(label) if of_tokens => escape(&label.text),
        _ if step.columns == Columns::One => String::new(),
        _ => column.to_string(),
    };
    let headings: String =
        (0..widest(step)).map(|it| format!("<th>{}</th>", heading(it))).collect();
    let number = |value: &f32| match value.is_finite() {
        true => format!("<td>{value:.3}</td>"),
        false => "<td>−∞</td>".to_string(),
    };
    let row = |(label, values): (&Label, &Vec<f32>)| {
        let values: String = values.iter().map(number).collect();
        format!("<tr><td class=\"text\">{}</td>{values}</tr>\n", escape(&label.text))
    };
    let rows: String = labels.iter().zip(&step.values).map(row).collect();
    format!(
        "<div class=\"scroll\"><table>\n<thead><tr><th></th>{headings}</tr></thead>\n\
         <tbody>\n{rows}</tbody>\n</table></div>"
    )
}

fn picture(step: &Step, labels: &[Label], size: usize) -> Result<String> {
    let (columns, names): (_, &[Label]) = match step.columns {
        Columns::Tokens | Columns::Shares => (size, labels),
        Columns::Channels => (widest(step).div_ceil(MOST_CHANNELS).max(1), &[]),
        Columns::One => (1, &[]),
    };
    let map = pool(&step.values, (size, columns), |square, _| mean_of_seen(square));
    let shares = step.columns == Columns::Shares;
    let (least, most) = ends(&map);
    let min = if shares { 0.0 } else { least };
    let scale = Scale { name: step.name, min, max: most, root: shares };
    let side = if names.is_empty() { "" } else { "token looked at" };
    let drawn = draw::heat_map(&map, (labels, names), ("token", side), &scale)?;
    Ok(format!("<div>{drawn}</div>"))
}

/// The mean of the numbers that are there; minus infinity if there are none.
fn mean_of_seen(square: &[f32]) -> f32 {
    let seen = || square.iter().filter(|value| value.is_finite());
    match seen().count() {
        0 => f32::NEG_INFINITY,
        count => seen().sum::<f32>() / count as f32,
    }
}

fn ends(map: &Map) -> (f32, f32) {
    let seen = map.iter().flatten().copied().filter(|value| value.is_finite());
    seen.fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), value| {
        (least.min(value), most.max(value))
    })
}
