//! Are texts found better without what is generic in their vectors? Fitted and chosen on other texts.

use hybrid_attention::evaluate::Estimate;
use hybrid_attention::memory::evaluate::{AtLayer, Generics, Passage, Row, Tested};
use serde_json::{Value, json};

use super::{Options, Report, bar, estimate};
use crate::files::read_text;
use crate::terminal::Result;

pub(super) fn run<'a>(options: &Options, lines: impl Iterator<Item = &'a str>) -> Result<Report> {
    let path = options
        .others
        .as_ref()
        .ok_or("--what generic needs --others: texts to fit to and to choose by")?;
    let others = read_text(path)?;
    let (model, _) = options.model.load()?;
    let passages = options.cut(&model, lines)?;
    let others = others.lines().filter(|line| !line.trim().is_empty());
    let others: Vec<Passage> = others
        .filter_map(|line| Passage::cut(&model, line, options.tokens).transpose())
        .take(options.most().saturating_mul(3))
        .collect::<hybrid_attention::Result<_>>()?;
    let (fit, rest) = others.split_at(others.len() / 3);
    let (choose, rest) = rest.split_at(rest.len() / 2);

    let mut generics = Generics { draws: options.draws, ..Generics::new(&model) };
    if let Some(layers) = &options.layers {
        generics.layers = layers.iter().map(|layer| Some(*layer)).chain([None]).collect();
    }
    if let Some(counts) = &options.directions {
        generics.counts.clone_from(counts);
    }
    let tests = [passages.as_slice(), rest];
    let bar = bar(generics.layers.len() * (2 + tests.len()));
    let tested = generics.run(&model, [fit, choose], &tests, || bar.inc(1))?;
    bar.finish_and_clear();
    let names = [options.texts.display().to_string(), format!("the rest of {}", path.display())];
    let sizes = [fit.len(), choose.len()];
    Ok(Report {
        json: json(options, sizes, &names, &tested),
        table: table(options, sizes, &names, &tested),
    })
}

/// What a row is compared with: nothing taken out of the same vectors, directions by chance, and what `embed` does by
/// default.
fn differences(tested: &Tested, at: &AtLayer, row: &Row) -> [Option<Estimate>; 3] {
    let named = |at: &AtLayer, name: &str| at.rows.iter().find(|it| it.name == name).cloned();
    let less = |other: Option<Row>| {
        let other = other?;
        Some(Estimate::of_difference(&row.reciprocal_ranks, &other.reciprocal_ranks))
    };
    let default = tested.layers.iter().find(|at| at.layer.is_none());
    let is_default = at.layer.is_none() && row.name == Generics::NOTHING;
    [
        less(named(at, Generics::NOTHING)).filter(|_| row.name != Generics::NOTHING),
        less(named(at, Generics::RANDOM)).filter(|_| row.name == Generics::BOTH),
        less(default.and_then(|at| named(at, Generics::NOTHING))).filter(|_| !is_default),
    ]
}

fn json(options: &Options, sizes: [usize; 2], names: &[String; 2], tested: &[Tested]) -> Value {
    let row = |tested: &Tested, at: &AtLayer, row: &Row| {
        let [nothing, random, default] = differences(tested, at, row);
        json!({
            "taken_out": row.name,
            "mrr": Estimate::of(&row.reciprocal_ranks),
            "recall_at_1": Estimate::of(&row.found_first),
            "less_nothing": nothing,
            "less_random": random,
            "less_default": default,
            "reciprocal_ranks": row.reciprocal_ranks,
        })
    };
    let layer = |tested: &Tested, at: &AtLayer| {
        json!({
            "layer": at.layer, "chosen": at.chosen, "k": at.k, "most": at.most, "mean": at.explained.mean,
            "directions": at.explained.directions, "by_chance": at.by_chance, "overlap": at.overlap,
            "rows": at.rows.iter().map(|it| row(tested, at, it)).collect::<Vec<_>>(),
        })
    };
    let test = |(name, tested): (&String, &Tested)| {
        json!({
            "texts": name,
            "passages": tested.tf_idf.reciprocal_ranks.len(),
            "tf_idf": Estimate::of(&tested.tf_idf.reciprocal_ranks),
            "layers": tested.layers.iter().map(|at| layer(tested, at)).collect::<Vec<_>>(),
        })
    };
    let tests: Vec<Value> = names.iter().zip(tested).map(test).collect();
    json!({ "fit": sizes[0], "choose": sizes[1], "tokens": options.tokens, "draws": options.draws, "tests": tests })
}

fn name(layer: Option<usize>) -> String {
    layer.map_or("behind the final norm".into(), |layer| format!("entering layer {layer}"))
}

/// Two Markdown tables for each set of texts.
fn table(options: &Options, sizes: [usize; 2], names: &[String; 2], tested: &[Tested]) -> String {
    let mut table = format!(
        "The first {0} tokens of each text are found by the next {0}. What is generic is that of {1} other texts; k of 1 to \
         {2} directions, and the layer (*), are those by which {3} others are found best. MRR ± standard error, and \
         differences text by text; directions by chance are the mean of {4} draws.\n",
        options.tokens,
        sizes[0],
        tested.iter().flat_map(|it| &it.layers).map(|at| at.most).max().unwrap_or(0),
        sizes[1],
        options.draws,
    );
    for (file, tested) in names.iter().zip(tested) {
        table += &format!(
            "\n{file}: {} texts; tf-idf finds {}\n\n\
             | states | k | taken out | MRR | less nothing | less random | less the default | recall@1 |\n\
             |---|---|---|---|---|---|---|---|\n",
            tested.tf_idf.reciprocal_ranks.len(),
            estimate(&tested.tf_idf.reciprocal_ranks),
        );
        for at in &tested.layers {
            let star = if at.chosen { " (*)" } else { "" };
            for row in &at.rows {
                let cells = differences(tested, at, row)
                    .map(|it| it.map_or(String::new(), Estimate::signed));
                table += &format!(
                    "| {}{star} | {} | {} | {} | {} | {} |\n",
                    name(at.layer),
                    at.k,
                    row.name,
                    estimate(&row.reciprocal_ranks),
                    cells.join(" | "),
                    estimate(&row.found_first),
                );
            }
        }
        table += "\n| states | mean, % of the squared length | directions | % of the variance | by chance | overlap with their own |\n\
                  |---|---|---|---|---|---|\n";
        for at in &tested.layers {
            table += &format!(
                "| {} | {:.1} | {} | {:.1} | {:.1} | {:.2} |\n",
                name(at.layer),
                100.0 * at.explained.mean,
                at.most,
                100.0 * at.explained.directions,
                100.0 * at.by_chance,
                at.overlap,
            );
        }
    }
    table
}
