"""Zoo: the reference networks, and the recipes that train them."""

from gradmend.zoo.networks import mlp as mlp
from gradmend.zoo.recipes import RECIPES as RECIPES
from gradmend.zoo.recipes import Recipe as Recipe
from gradmend.zoo.recipes import recipe as recipe
from gradmend.zoo.recipes import usual_data as usual_data
from gradmend.zoo.recipes import usual_settings as usual_settings
from gradmend.zoo.recurrent import recurrent as recurrent
