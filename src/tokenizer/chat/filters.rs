//! The filters, tests, functions and methods of minijinja, each of which asks the budget before it runs and has
//! what it made counted: its fuel counts a call as one step, however long.

use std::sync::Arc;

use minijinja::value::{DynObject, Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters, functions, tests};
use minijinja_contrib::pycompat;

use super::budget::{Budget, raised};
use super::json::to_json;
use super::operators::settle;

/// The widest that a template may pad, indent, round or batch.
const WIDEST: u64 = 1000;

/// Filters that pass on what they find in a list, and need not look at all of it.
const PICKING: [&str; 19] = [
    "attr",
    "batch",
    "bool",
    "chain",
    "count",
    "d",
    "default",
    "dictsort",
    "first",
    "items",
    "last",
    "length",
    "list",
    "map",
    "reject",
    "rejectattr",
    "select",
    "selectattr",
    "slice",
];

/// Filters that compare elements with one another.
const COMPARING: [&str; 6] = ["groupby", "max", "min", "sort", "sum", "unique"];

pub(super) fn add_to(env: &mut Environment<'_>, budget: &Arc<Budget>) {
    macro_rules! add_filters {
        ($($name:literal => $filter:path),* $(,)?) => {
            $(add_filter(env, budget, $name, Value::from_function($filter));)*
        };
    }
    add_filters! {
        "abs" => filters::abs, "attr" => filters::attr, "batch" => filters::batch,
        "bool" => filters::bool, "capitalize" => filters::capitalize, "chain" => filters::chain,
        "count" => filters::length, "d" => filters::default, "default" => filters::default,
        "dictsort" => filters::dictsort, "e" => filters::escape, "escape" => filters::escape,
        "first" => filters::first, "float" => filters::float, "format" => filters::format,
        "groupby" => filters::groupby, "indent" => filters::indent, "int" => filters::int,
        "items" => filters::items, "join" => filters::join, "last" => filters::last,
        "length" => filters::length, "lines" => filters::lines, "list" => filters::list,
        "lower" => filters::lower, "map" => filters::map, "max" => filters::max,
        "min" => filters::min, "reject" => filters::reject, "rejectattr" => filters::rejectattr,
        "replace" => filters::replace, "reverse" => filters::reverse, "round" => filters::round,
        "safe" => filters::safe, "select" => filters::select, "selectattr" => filters::selectattr,
        "slice" => filters::slice, "sort" => filters::sort, "split" => filters::split,
        "string" => filters::string, "sum" => filters::sum, "title" => filters::title,
        "trim" => filters::trim, "unique" => filters::unique, "upper" => filters::upper,
        "zip" => filters::zip,
    }
    let json = budget.clone();
    env.add_filter("tojson", move |value: &Value, positional: Rest<Value>, options: Kwargs| {
        to_json(&json, value, positional, options)
    });
    let pretty = budget.clone();
    env.add_filter("pprint", move |value: &Value| {
        pretty.look(value)?;
        pretty.text(format_args!("{value:#?}"))
    });

    macro_rules! add_tests {
        ($($($name:literal)|+ => $test:path),* $(,)?) => {
            $($(add_test(env, budget, $name, Value::from_function($test));)+)*
        };
    }
    add_tests! {
        "eq" | "equalto" | "==" => tests::is_eq, "ne" | "!=" => tests::is_ne,
        "lt" | "lessthan" | "<" => tests::is_lt, "le" | "<=" => tests::is_le,
        "gt" | "greaterthan" | ">" => tests::is_gt, "ge" | ">=" => tests::is_ge,
        "in" => tests::is_in, "startingwith" => tests::is_startingwith,
        "endingwith" => tests::is_endingwith, "lower" => tests::is_lower,
        "upper" => tests::is_upper, "sameas" => tests::is_sameas,
    }
    // In minijinja one can ask for the elements of none, and gets none of them: in Jinja that is an error, and
    // templates ask first.
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());

    let kept = budget.clone();
    let namespace = Value::from_function(functions::namespace);
    env.add_function("namespace", move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        args.iter().try_for_each(|arg| kept.keep(arg).and_then(|bytes| kept.make(bytes)))?;
        namespace.call(state, &args)
    });
    let held = budget.clone();
    let dict = Value::from_function(functions::dict);
    env.add_function("dict", move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        args.iter().try_for_each(|arg| held.keep(arg).and_then(|bytes| held.make(bytes)))?;
        dict.call(state, &args)
    });
    // It prints what the engine knows, and Jinja has it only where it is asked for.
    env.remove_global("debug");

    let methods = budget.clone();
    env.set_unknown_method_callback(move |state, value, method, args| {
        call_method(&methods, state, value, method, args)
    });
    let written = budget.clone();
    env.set_formatter(move |out, state, value| match state.auto_escape() {
        minijinja::AutoEscape::None => written.write(out, format_args!("{value}")),
        // A character becomes six at most.
        _ => {
            written.make(written.look(value)?.saturating_mul(6))?;
            minijinja::escape_formatter(out, state, value)
        }
    });
}

fn add_filter(env: &mut Environment<'_>, budget: &Arc<Budget>, name: &'static str, filter: Value) {
    let budget = budget.clone();
    env.add_filter(name, move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        let picks = PICKING.contains(&name);
        let Some((value, options)) = args.split_first() else {
            return filter.call(state, &args);
        };
        if picks {
            // A text is a list of its characters.
            let parts = value.as_str().map_or_else(|| value.len().unwrap_or(0), str::len);
            if !matches!(name, "length" | "count" | "default" | "d" | "bool" | "first" | "last") {
                budget.elements(parts)?;
                budget.read((parts as u64).saturating_mul(32))?;
            }
            budget.touch(value)?;
        } else {
            budget.look(value)?;
        }
        let options_of = options
            .iter()
            .try_fold(0, |sum, option| Ok::<u64, Error>(sum + budget.look(option)?))?;
        narrow(name, options)?;
        let comparing = COMPARING.contains(&name);
        if comparing {
            // Some twenty comparisons for each element, and sums of texts that grow.
            let bytes = budget.look(value)?;
            let times = if name == "sum" { value.len().unwrap_or(1) as u64 } else { 20 };
            budget.read(bytes.saturating_mul(times))?;
        }
        bound(&budget, name, value, options, options_of)?;
        let made = filter.call(state, &args)?;
        finish(&budget, made, picks)
    });
}

/// Lists what came out of a filter or a method, and counts it: all of it, or the elements of a list.
fn finish(budget: &Budget, made: Value, picks: bool) -> Result<Value, Error> {
    let made = settle(budget, made)?;
    match made.kind() {
        ValueKind::Map | ValueKind::Seq if picks => budget.elements(made.len().unwrap_or(0))?,
        ValueKind::Map | ValueKind::Seq => budget.make(budget.keep(&made)?)?,
        _ => (),
    }
    Ok(made)
}

fn add_test(env: &mut Environment<'_>, budget: &Arc<Budget>, name: &'static str, test: Value) {
    let budget = budget.clone();
    env.add_test(name, move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        args.iter().try_for_each(|arg| budget.look(arg).map(|_| ()))?;
        test.call(state, &args)
    });
}

fn call_method(
    budget: &Budget,
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let picks = value.kind() == ValueKind::Map;
    let mut given = 0;
    if !picks {
        budget.look(value)?;
    }
    for arg in args {
        given += budget.look(arg)?;
    }
    match value.kind() {
        ValueKind::String => bound(budget, method, value, args, given)?,
        ValueKind::Map => budget.read(32 * value.len().unwrap_or(0) as u64)?,
        _ => (),
    }
    let made = pycompat::unknown_method_callback(state, value, method, args)?;
    finish(budget, made, picks)
}

/// Refuses numbers that say how wide something becomes.
fn narrow(name: &str, options: &[Value]) -> Result<(), Error> {
    if !matches!(name, "indent" | "batch" | "slice" | "round") {
        return Ok(());
    }
    let wide = |value: &Value| {
        i128::try_from(value.clone()).is_ok_and(|n| n.unsigned_abs() > u128::from(WIDEST))
    };
    let among = |value: &Value| match value.as_object().and_then(DynObject::try_iter_pairs) {
        Some(mut pairs) => pairs.any(|(_, value)| wide(&value)),
        None => wide(value),
    };
    if options.iter().any(among) {
        return Err(raised(format!("{name} by more than {WIDEST}")));
    }
    Ok(())
}

/// Asks for what a filter or a method of a text may make, where that is more than what it was given.
fn bound(
    budget: &Budget,
    name: &str,
    value: &Value,
    options: &[Value],
    given: u64,
) -> Result<(), Error> {
    let text = value.as_str().unwrap_or_default();
    let len = text.len() as u64;
    let option = |index: usize| options.get(index).and_then(Value::as_str);
    let matches = |pattern: Option<&str>| match pattern {
        Some(pattern) => text.matches(pattern).count() as u64,
        None => len,
    };
    match name {
        "replace" => {
            let new = option(1).map_or(given, |new| new.len() as u64);
            budget.fits(len.saturating_add(matches(option(0)).saturating_mul(new)))
        }
        "split" | "lines" | "splitlines" => {
            let pattern = if name == "split" { option(0) } else { Some("\n") };
            budget.read(len)?;
            // Blanks are what a text is split by where nothing is named.
            let pieces = match pattern {
                Some(pattern) => text.matches(pattern).count(),
                None => text.split_whitespace().count(),
            };
            budget.fits(32 * (pieces as u64 + 2))
        }
        // Slow for each character.
        "title" => budget.read(16 * len),
        "trim" | "strip" | "lstrip" | "rstrip" => {
            budget.read(len.saturating_mul(option(0).map_or(1, |chars| 1 + chars.len() as u64)))
        }
        "indent" => budget.fits(len.saturating_add((matches(Some("\n")) + 1) * WIDEST)),
        // As a filter of a list, or as a method of what is put between.
        "join" if value.as_str().is_none() => {
            let separator = option(0).map_or(0, |text| text.len() as u64);
            let count = value.len().unwrap_or(0) as u64;
            let bytes = budget.look(value)?;
            budget.fits(bytes.saturating_add(count.saturating_mul(separator)))
        }
        "join" => {
            let count = options.first().and_then(Value::len).unwrap_or(0) as u64;
            budget.fits(given.saturating_add(count.saturating_mul(len)))
        }
        "format" => format(budget, text, options, given),
        _ => Ok(()),
    }
}

/// A pattern can name its arguments any number of times, and any width.
fn format(budget: &Budget, pattern: &str, options: &[Value], given: u64) -> Result<(), Error> {
    let mut widest = 0;
    for digits in pattern.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty()) {
        widest = widest.max(digits.parse().unwrap_or(u64::MAX));
    }
    // A width can also be an argument.
    if pattern.contains('*') || pattern.contains(":{") || pattern.contains(".{") {
        let numbers = options.iter().filter_map(|value| u64::try_from(value.clone()).ok());
        widest = numbers.fold(widest, u64::max);
    }
    if widest > WIDEST {
        return Err(raised(format!("format by more than {WIDEST}")));
    }
    // minijinja cuts a subscript at bytes, in the middle of a character too.
    if pattern.contains('[') && !pattern.is_ascii() {
        let message = "format with a subscript takes ASCII only";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    let fields = pattern.matches(['{', '%']).count() as u64;
    let field = given.saturating_add(widest).saturating_mul(4);
    let bytes = fields.saturating_mul(field).saturating_add(pattern.len() as u64);
    budget.fits(bytes)
}
