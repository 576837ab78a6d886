//! What answers questions about what was told over several conversations, and put right since?

use hybrid_attention::evaluate::Estimate;
use hybrid_attention::memory::evaluate::{Conversations, Held, Story};
use serde_json::{Value, json};

use super::{Options, Report, bar, estimate};
use crate::terminal::Result;

pub(super) fn run<'a>(options: &Options, lines: impl Iterator<Item = &'a str>) -> Result<Report> {
    let story = |(number, line)| {
        serde_json::from_str::<Story>(line)
            .map_err(|error| format!("{}: story {number}: {error}", options.texts.display()).into())
    };
    let stories = (1..).zip(lines.take(options.most())).map(story).collect::<Result<Vec<_>>>()?;
    let (model, _) = options.model.load()?;
    let best = usize::try_from(options.best).unwrap_or(usize::MAX);
    let conversations = Conversations { best, ..Conversations::default() };
    let bar = bar(stories.len());
    let rows = conversations.run(&model, &stories, || bar.inc(1))?;
    bar.finish_and_clear();
    let table = table(&conversations, stories.len(), &rows);
    Ok(Report { json: json(&conversations, stories.len(), &rows), table })
}

/// How much more often a row is right than with all of it in the prompt.
fn less_all(rows: &[Held], row: &Held) -> Option<Estimate> {
    let all = rows.iter().find(|other| other.name == Conversations::ALL)?;
    (row.name != all.name).then(|| Estimate::of_difference(&row.right, &all.right))
}

fn json(settings: &Conversations, stories: usize, rows: &[Held]) -> Value {
    let row = |row: &Held| json!({ "right": Estimate::of(&row.right), "less_all": less_all(rows, row), "figures": row });
    let rows: Vec<Value> = rows.iter().map(row).collect();
    json!({ "stories": stories, "best": settings.best, "recency": settings.recency, "rows": rows })
}

/// A Markdown table.
fn table(settings: &Conversations, stories: usize, rows: &[Held]) -> String {
    let best = settings.best;
    let mut table = format!(
        "{stories} stories, {best} notes recalled. Shares of the questions, ± standard error over stories; \"choice\" is \
         the likeliest of the names that may be answered, \"text\" what is generated.\n\n\
         | in the prompt | recall@1 | recall@{best} | a corrected note recalled | right: choice | less all of it | \
         corrected facts: right | the old way | right: text | corrected facts: the old way |\n\
         |---|---|---|---|---|---|---|---|---|---|\n"
    );
    for row in rows {
        let share = |values: &[f64]| match values.is_empty() {
            true => String::new(),
            false => estimate(values),
        };
        let cells = [
            share(&row.first),
            share(&row.recalled),
            share(&row.old_recalled),
            share(&row.right),
            less_all(rows, row).map_or(String::new(), Estimate::signed),
            share(&row.right_corrected),
            share(&row.old),
            share(&row.said),
            share(&row.old_said),
        ];
        table += &format!("| {} | {} |\n", row.name, cells.join(" | "));
    }
    table
}
