//! The calls that [`rewrite`](super::rewrite) puts into a template, and the operators that make something.

use std::sync::Arc;

use minijinja::value::{Rest, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::budget::{Budget, raised};
use super::rewrite::{ADD, CONCAT, HOLD, ITERATE, KEEP, LOOK, MULTIPLY, SETTLE, TOUCH};

pub(super) fn add_to(env: &mut Environment<'_>, budget: &Arc<Budget>) {
    let mut one = |name: &'static str, ask: fn(&Budget, Value) -> Result<Value, Error>| {
        let budget = budget.clone();
        env.add_function(name, move |args: Rest<Value>| {
            ask(&budget, args.0.into_iter().next().unwrap_or_default())
        });
    };
    one(LOOK, |budget, value| budget.look(&value).map(|_| value));
    one(TOUCH, |budget, value| budget.touch(&value).map(|()| value));
    one(ITERATE, |budget, value| match value.is_none() {
        true => Err(raised("'NoneType' object is not iterable")), // as Python says it
        false => budget.touch(&value).map(|()| value),
    });
    one(KEEP, |budget, value| budget.keep(&value).map(|_| value));
    one(HOLD, |budget, value| {
        budget.look(&value)?;
        budget.elements(value.len().unwrap_or(0))?;
        Ok(value)
    });
    one(SETTLE, settle);

    let mut two = |name: &'static str, run: fn(&Budget, &Value, &Value) -> Result<Value, Error>| {
        let budget = budget.clone();
        env.add_function(name, move |args: Rest<Value>| match args.0.as_slice() {
            [left, right] => run(&budget, left, right),
            _ => Err(raised("an operator without two operands")),
        });
    };
    two(CONCAT, |budget, left, right| Ok(budget.text(format_args!("{left}{right}"))?.into()));
    two(ADD, add);
    two(MULTIPLY, multiply);
}

/// What can be iterated over, as the list that Python would make of it: what is lazy may stand on what is lazy,
/// and so on, and the end of that would be a stack of calls as deep.
pub(super) fn settle(budget: &Budget, value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Iterable => elements(budget, &value).map(Value::from),
        ValueKind::String => {
            budget.make(value.as_str().map_or(0, |text| text.len() as u64))?;
            Ok(value)
        }
        _ => Ok(value),
    }
}

/// The elements of a list, or of anything that can be iterated over.
pub(super) fn elements(budget: &Budget, value: &Value) -> Result<Vec<Value>, Error> {
    let mut list = Vec::new();
    for value in value.try_iter()?.checked() {
        budget.elements(1)?;
        budget.read(32)?;
        list.push(value?);
    }
    // All of it together is one value.
    budget.elements(list.len())?;
    Ok(list)
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn add(budget: &Budget, left: &Value, right: &Value) -> Result<Value, Error> {
    if let (Some(left), Some(right)) = (left.as_str(), right.as_str()) {
        budget.make((left.len() + right.len()) as u64)?;
        return Ok([left, right].concat().into());
    }
    if is_list(left) && is_list(right) && left.is_tuple() == right.is_tuple() {
        let mut all = elements(budget, left)?;
        all.extend(elements(budget, right)?);
        let tuple = left.is_tuple();
        let sum = if tuple { Value::from(Tuple::from(all)) } else { Value::from(all) };
        budget.look(&sum)?;
        return Ok(sum);
    }
    arithmetic("+", left, right, i128::checked_add, |a, b| a + b)
}

fn multiply(budget: &Budget, left: &Value, right: &Value) -> Result<Value, Error> {
    let texts = left.as_str().map(|text| (text, right));
    if let Some((text, times)) = texts.or_else(|| right.as_str().map(|text| (text, left))) {
        let times = count(times, "strings can only be multiplied with integers")?;
        budget.make((text.len() as u64).saturating_mul(times as u64))?;
        return Ok(text.repeat(times).into());
    }
    let lists = is_list(left).then_some((left, right));
    if let Some((list, times)) = lists.or_else(|| is_list(right).then_some((right, left))) {
        let message = "sequences and iterables can only be multiplied with integers";
        let times = count(times, message)?;
        let once = elements(budget, list)?;
        budget.elements(once.len().saturating_mul(times))?;
        let all: Vec<Value> = (0..times).flat_map(|_| once.iter().cloned()).collect();
        let product =
            if list.is_tuple() { Value::from(Tuple::from(all)) } else { Value::from(all) };
        budget.look(&product)?;
        return Ok(product);
    }
    arithmetic("*", left, right, i128::checked_mul, |a, b| a * b)
}

fn count(times: &Value, message: &'static str) -> Result<usize, Error> {
    times.as_usize().ok_or_else(|| Error::new(ErrorKind::InvalidOperation, message))
}

/// As minijinja calculates, and complains.
fn arithmetic(
    operator: &str,
    left: &Value,
    right: &Value,
    whole: fn(i128, i128) -> Option<i128>,
    real: fn(f64, f64) -> f64,
) -> Result<Value, Error> {
    let number = |v: &Value| matches!(v.kind(), ValueKind::Number | ValueKind::Bool);
    let is_whole = |v: &Value| v.is_integer() || v.kind() == ValueKind::Bool;
    let failed = |message| Error::new(ErrorKind::InvalidOperation, message);
    if !number(left) || !number(right) {
        let (left, right) = (left.kind(), right.kind());
        return Err(failed(format!(
            "tried to use {operator} operator on unsupported types {left} and {right}"
        )));
    }
    if !is_whole(left) || !is_whole(right) {
        let float = |v: &Value| match v.kind() {
            ValueKind::Bool => Ok(f64::from(u8::from(v.is_true()))),
            _ => f64::try_from(v.clone()),
        };
        return Ok(real(float(left)?, float(right)?).into());
    }
    let int = |v: &Value| match v.kind() {
        ValueKind::Bool => Ok(i128::from(v.is_true())),
        _ => i128::try_from(v.clone()),
    };
    match whole(int(left)?, int(right)?) {
        Some(result) => Ok(i64::try_from(result).map_or_else(|_| result.into(), Value::from)),
        None => Err(failed(format!("unable to calculate {left} {operator} {right}"))),
    }
}
